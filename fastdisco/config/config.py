"""The whole configuration: its blocks, the method's recipe under them, and what they must agree
on."""

from typing import Annotated, Any

from pydantic import Field, field_serializer, model_validator

from fastdisco.config.block import Block
from fastdisco.config.blocks import (
    Bn,
    Checkpoint,
    Data,
    Engine,
    Eval,
    Log,
    OneOfMany,
    Optim,
    Perf,
    Run,
    Student,
    Teacher,
)
from fastdisco.config.crops import Crop, Crops
from fastdisco.config.merge import overlay
from fastdisco.config.methods import Dino, Moco, Seed, Swav
from fastdisco.config.recipes import RECIPES


class Config(Block):
    """A run's configuration.

    Defaults come from the method's recipe (recipes.py) where it has the key, otherwise from the
    blocks.  Checks run in the order in which they stand here, and the first that fails is told."""

    run: Run
    data: Data
    # What all crops of an image have in common.
    view: Crop = Crop()
    # The crops of an image, in groups.  Each group sets what differs from `view`.  Without views
    # the method's recipe has them.
    views: tuple[Crops, ...] = Field(min_length=1)
    student: Student = Student()
    # Several students, trained side by side from one teacher on the same views (docs/method.md).
    # Empty: the one of the block `student`.
    students: tuple[OneOfMany, ...] = ()
    # null: no distillation.
    teacher: Teacher | None = None
    bn: Bn = Bn()
    method: Annotated[Moco | Swav | Dino | Seed, Field(discriminator="name")] = Moco()
    optim: Optim = Optim()
    engine: Engine = Engine()
    perf: Perf = Perf()
    eval: Eval = Eval()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, raw: Any) -> Any:
        """Lays what was given over the recipe of its method.

        What is not well-formed passes unchanged: the checks of its block say what is wrong."""
        if not isinstance(raw, dict):
            return raw
        if cls.model_fields.keys() <= raw.keys():
            # As `dump` writes it, it says everything.  A key that it lacks is newer than the file,
            # and its own default is what the run had.
            return raw
        given, view = raw.get("method", {}), raw.get("view")
        if not isinstance(given, dict) or not isinstance(view, dict | None):
            return raw
        method = {"name": "moco"} | given
        name = method["name"]
        if not isinstance(name, str) or name not in RECIPES:
            return raw
        if raw.get("views") is None:
            _refuse_hidden_keys(name, view or {})
            # A null would hide the recipe's views.
            raw = {key: block for key, block in raw.items() if key != "views"}
        return overlay(RECIPES[name], raw | {"method": method})

    @field_serializer("views")
    def _as_given(self, views: tuple[Crops, ...]) -> list[dict[str, Any]]:
        # A group's defaults, written out, would hide `view` when they are read back.
        return [group.model_dump(mode="json", exclude_unset=True) for group in views]

    # ---- what the blocks must agree on

    @model_validator(mode="after")
    def _students_have_names(self) -> "Config":
        names = student_names(self)
        if twice := [n for n in names if names.count(n) > 1]:
            raise ValueError(
                f"students: {len(twice)} are named {twice[0]}; give each its own, as in students: "
                f"[{{name: ...}}]"
            )
        return self

    @model_validator(mode="after")
    def _method_has_its_crops(self) -> "Config":
        method = self.method
        crops = sum(group.count for group in self.views)
        # How many crops the method takes; None: two or more.
        exactly = {"moco": 2, "seed": 1}.get(method.name)
        if isinstance(method, Seed) and method.contrast:
            exactly = 2
        fits = crops == exactly if exactly else crops >= 2
        if not fits:
            wanted, here = (exactly, " here") if exactly else ("2 or more", "")
            raise ValueError(
                f"views: {method.name} takes {wanted} crops of an image{here}, found {crops}; "
                f"set views=[{{count: {exactly or 2}}}] for example"
            )
        return self

    @model_validator(mode="after")
    def _seed_has_a_teacher(self) -> "Config":
        if isinstance(self.method, Seed) and self.teacher is None:
            raise ValueError("teacher.file: SEED learns from a teacher alone; give one")
        return self

    @model_validator(mode="after")
    def _a_loss_has_weight(self) -> "Config":
        if isinstance(self.method, Moco):
            weights = {"contrast": self.method.contrast}
            if self.teacher:
                weights |= {"distill": self.method.distill} | {
                    f"rkd.{key}": weight for key, weight in self.method.rkd
                }
        elif isinstance(self.method, Seed):
            weights = {"distill": self.method.distill, "contrast": self.method.contrast}
        else:
            # SwAV's and DINO's own loss has weight 1.
            return self
        if not any(weights.values()):
            first, *others = (f"method.{key}" for key in weights)
            also = "" if self.teacher else ", or give a teacher (teacher.file)"
            raise ValueError(
                f"{first}: every loss has weight 0 ({', '.join([first, *others])}), so nothing "
                f"would be learned; set one above 0{also}"
            )
        return self

    @model_validator(mode="after")
    def _the_cosine_falls(self) -> "Config":
        rates = [self.optim.lr, *(one.lr for one in self.students if one.lr is not None)]
        if self.students and all(one.lr is not None for one in self.students):
            # Nobody takes it.
            rates = rates[1:]
        lowest = self.optim.model_copy(update={"lr": min(rates)}).scaled(self.data.batch)
        if self.optim.lr_min > lowest:
            raise ValueError(
                f"optim.lr_min: {self.optim.lr_min:g} is above the learning rate that the cosine "
                f"starts from, {lowest:g} (optim.lr, as scaled by optim.lr_scale); lower it"
            )
        return self

    @model_validator(mode="after")
    def _the_steps_fall(self) -> "Config":
        optim, epochs = self.optim, self.run.epochs
        if optim.schedule == "step" and not any(m < epochs for m in optim.milestones):
            found = ", ".join(map(str, optim.milestones)) or "none is given"
            raise ValueError(
                f"optim.milestones: none lies within the {epochs} epochs (run.epochs), found {found}, "
                "so the learning rate would never fall; set some, or optim.schedule=constant"
            )
        return self

    @model_validator(mode="after")
    def _queue_fits_the_batch(self) -> "Config":
        method, batch = self.method, self.data.batch
        if isinstance(method, Moco | Seed) and method.queue < batch:
            raise ValueError(
                f"method.queue: {method.queue} keys cannot hold one step's {batch} (data.batch); "
                "enlarge it"
            )
        if isinstance(method, Swav) and method.queue % batch:
            below = method.queue // batch * batch
            raise ValueError(
                f"method.queue: {method.queue} embeddings are no multiple of data.batch {batch}; "
                f"nearest: {below} or {below + batch}"
            )
        return self

    @model_validator(mode="after")
    def _shuffle_by_loading(self) -> "Config":
        if self.bn.shuffle != "load":
            return self
        if not isinstance(self.method, Moco | Seed):
            raise ValueError(
                f"bn.shuffle: load hands out other images as view B, and {self.method.name} "
                "compares the views of an image; set bn.shuffle=off"
            )
        if self.teacher and self.teacher.cache != "off":
            raise ValueError(
                "bn.shuffle: load hands out other images as view B, and "
                f"teacher.cache={self.teacher.cache} replays embeddings of whole images; set "
                "bn.shuffle=gather or off"
            )
        return self

    @model_validator(mode="after")
    def _recorded_targets_have_length_1(self) -> "Config":
        raw = isinstance(self.method, Swav) and self.method.target == "published"
        if raw and self.teacher and self.teacher.cache != "off":
            raise ValueError(
                "method.target: published needs the lengths of the teacher's embeddings, and "
                f"teacher.cache={self.teacher.cache} keeps rows of length 1; set "
                "method.target=normalised or teacher.cache=off"
            )
        return self

    @model_validator(mode="after")
    def _zero_keeps_no_single_gradients(self) -> "Config":
        if not self.engine.stage:
            return self
        freeze = {"swav": "freeze_steps", "dino": "freeze_epochs"}.get(self.method.name)
        if freeze and getattr(self.method, freeze):
            raise ValueError(
                f"method.{freeze}: at engine.stage {self.engine.stage} gradients are flat pieces "
                f"of many tensors, and none can be left out of a step; set method.{freeze}=0 or "
                "engine.stage=0"
            )
        if self.optim.clip_each:
            raise ValueError(
                f"optim.clip_each: at engine.stage {self.engine.stage} gradients are flat pieces "
                "of many tensors; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_crops_fit(self) -> "Config":
        if self.data.eval_size > self.data.eval_resize:
            raise ValueError(
                f"data.eval_size: a crop of {self.data.eval_size} does not fit images resized to "
                f"{self.data.eval_resize} (data.eval_resize)"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> "Config":
        if self.optim.warmup_epochs >= self.run.epochs:
            raise ValueError(
                f"optim.warmup_epochs: {self.optim.warmup_epochs:g} leave nothing of the "
                f"{self.run.epochs} epochs (run.epochs); lower it"
            )
        return self

    @model_validator(mode="after")
    def _what_is_compiled_runs(self) -> "Config":
        what = self.perf.compile
        if what in ("student", "both") and self.engine.stage == 3:
            raise ValueError(
                f"perf.compile: {what} works at engine.stage 0 to 2, for at 3 weights "
                "come and go within the forward"
            )
        if what not in ("teacher", "both"):
            return self
        if self.teacher is None:
            raise ValueError(
                f"perf.compile: {what}, but there is no teacher; set teacher.file, or "
                "student or false"
            )
        if self.teacher.cache != "off":
            raise ValueError(
                f"perf.compile: {what}, but with teacher.cache={self.teacher.cache} "
                "no teacher runs; set student or false"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_has_images(self) -> "Config":
        if self.eval.every and self.data.val is None:
            raise ValueError(
                "eval.every: the kNN evaluation needs data.val, a folder of class folders"
            )
        return self


def student_names(cfg: Config) -> list[str]:
    """The names of `students`, in order: what the entry says, otherwise its architecture."""
    return [one.name or one.arch or cfg.student.arch for one in cfg.students]


def _refuse_hidden_keys(name: str, view: dict[str, Any]) -> None:
    """Refuses keys of `view` that the views of the method's recipe set themselves, which would hide
    them."""
    views = RECIPES[name]["views"]
    own = {key for group in views for key in group}
    if taken := sorted(own & set(view)):
        raise ValueError(
            f"view.{taken[0]}: the crops of {name} have a {taken[0]} of their "
            f"own; write them out as views, by default {views}"
        )
