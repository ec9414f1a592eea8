"""Every key of the configuration, its default and its check; those of the methods are in
methods.py."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from fastdisco.config.block import Block
from fastdisco.config.crops import Crop, Crops
from fastdisco.config.merge import overlay
from fastdisco.config.methods import Dino, Moco, Seed, Swav
from fastdisco.config.recipes import RECIPES


class Run(Block):
    name: str  # outputs go to out/name/
    out: Path = Path("out")
    seed: int = Field(0, ge=0, lt=2**32)  # of weights, order, views and shuffles
    epochs: int = Field(200, ge=1)
    # Stop here although the schedule is made for all epochs.
    max_steps: int | None = Field(None, ge=1)

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name):
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise ValueError("one folder name of letters, digits and . _ + -")
        return name


class Data(Block):
    train: Path  # a folder of class folders, a list file, or tars: see docs/data.md
    val: Path | None = None  # the same; needed by the kNN evaluation
    # Names of images to leave out; looked for in the folders of train and val.  null: none.
    quarantine: Path | None = Path("quarantine.txt")
    # Images per optimizer step, over all ranks and accumulated micro batches.
    batch: int = Field(256, ge=1)
    accumulate: int = Field(1, ge=1)  # micro batches per step
    threads: int = Field(4, ge=1)  # DALI's CPU threads on each rank
    decode: Literal["auto", "gpu", "cpu"] = "auto"  # auto: where data.augment is
    # Crop, colours, blur; auto: on the GPU where there is one.
    augment: Literal["auto", "gpu", "cpu"] = "auto"
    # Share of the JPEGs for the GPU's decoding engine (A100, H100 ...), the rest to its cores.
    hw_decoder_load: float = Field(0.65, ge=0, le=1)
    prefetch: int = Field(2, ge=1)  # batches made ahead
    eval_resize: int = Field(256, ge=8)  # short side before the centre crop
    eval_size: int = Field(224, ge=8)  # side of the centre crop
    eval_batch: int = Field(128, ge=1)  # images per rank

    @model_validator(mode="after")
    def _nothing_goes_back(self):
        if self.decode == "gpu" and self.augment == "cpu":
            raise ValueError(
                "decode: gpu with data.augment: cpu would copy every image back; take cpu for "
                "both, or gpu for data.augment"
            )
        return self


class Student(Block):
    arch: str = "mobilenetv3_large_100"  # any timm model
    # Linear layers with ReLU, two; or with GELU, three: see heads.py.
    head: Literal["mlp", "dino"] = "mlp"
    head_bn: bool = False  # batch norm in the head, as SwAV's has
    hidden: int = Field(2048, ge=0)  # width of the head's hidden layers; 0: a single linear layer
    dim: int = Field(128, ge=1)  # width of the embedding
    kwargs: dict[str, Any] = {}  # handed to timm.create_model


class OneOfMany(Block):
    """An entry of `students`: what differs from the student and optim blocks."""

    name: str | None = None  # in metrics, checkpoints and --student; null: the architecture's
    arch: str | None = None  # null, here and below: as in the student block
    hidden: int | None = Field(None, ge=0)
    kwargs: dict[str, Any] | None = None
    lr: float | None = Field(None, ge=0)  # null: optim.lr

    @field_validator("name")
    @classmethod
    def _one_word(cls, name):
        if name is not None and not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError("a word of letters, digits and . _ + -")
        return name


class Teacher(Block):
    # A checkpoint as its training wrote it, or the folder of a fastdisco run: docs/teachers.md.
    file: Path
    # The timm model that the file's backbone belongs to; null: told by the file.
    arch: str | None = None
    kwargs: dict[str, Any] = {}  # handed to timm.create_model
    student: str | None = None  # which of the students of a fastdisco run that has several
    # Of weights and activations.  auto: fp16 on a GPU, engine.precision on a CPU.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Batch: by the statistics of bn_group images of a view, as in the official code.
    bn: Literal["eval", "batch"] = "eval"
    bn_group: int = Field(32, ge=2)
    fold: bool = True  # batch norm into the layers before it, with bn: eval
    graph: bool = True  # on a GPU its forward is a CUDA graph that runs beside the student's
    # Replay: recorded embeddings, no teacher; record: the same, after what is missing.
    cache: Literal["off", "record", "replay"] = "off"
    cache_folder: Path = Path("out/teacher_cache")
    # Epochs whose views are recorded; epoch e has the views of epoch e mod cache_rounds.
    cache_rounds: int = Field(10, ge=1)

    @field_validator("cache", mode="before")
    @classmethod
    def _off_to_word(cls, value):
        return "off" if value is False else value  # as YAML 1.1 reads off

    @model_validator(mode="after")
    def _recordable(self):
        if self.cache != "off" and self.bn == "batch":
            raise ValueError(
                f"cache: {self.cache} needs bn: eval, for with batch an embedding depends on the "
                "other images of its batch; set teacher.cache=off or teacher.bn=eval"
            )
        return self


class Bn(Block):
    # Batch-norm statistics over 1/groups of a rank's micro batch, as `groups` GPUs would have them.
    groups: int = Field(1, ge=1)
    # How the key encoder sees the batch permuted over ranks and groups (MoCo, section 3.3): gather
    # sends the images around, load has each rank load its share of the permuted batch instead, for
    # all networks (docs/method.md); true and false are read as gather and off.
    shuffle: Literal["gather", "load", "off"] = "gather"
    sync: bool = False  # statistics over all ranks, GPUs only

    @field_validator("shuffle", mode="before")
    @classmethod
    def _bool_to_word(cls, value):
        # YAML reads a bare off as false.
        return {True: "gather", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _groups_or_sync(self):
        if self.sync and self.groups > 1:
            raise ValueError(
                f"bn.sync: statistics over all ranks and in {self.groups} parts of each "
                "(bn.groups) exclude each other; set one of them"
            )
        return self


class Optim(Block):
    name: str = "sgd"  # any name of timm.optim
    lr: float = Field(0.03, ge=0)
    lr_scale: Literal["none", "linear", "sqrt"] = "none"  # lr times (data.batch / 256), or its root
    lr_min: float = Field(0.0, ge=0)  # where the cosine ends; not scaled
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    # Where a cosine of its own ends; null: it stays.
    weight_decay_end: float | None = Field(None, gt=0)
    decay_norm_and_bias: bool = True  # as MoCo and DisCo do
    clip: float = Field(0.0, ge=0)  # norm of the gradient; 0: off
    clip_each: bool = False  # the norm is each weight tensor's own, as in DINO's code
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    per: Literal["step", "epoch"] = "step"  # how often the schedule moves
    warmup_epochs: float = Field(0.0, ge=0)
    milestones: tuple[int, ...] = (120, 160)  # epochs at which `step` multiplies lr by 0.1

    @model_validator(mode="after")
    def _schedules(self):
        if self.lr_min and self.schedule != "cosine":
            raise ValueError(
                f"optim.lr_min: the schedule {self.schedule} does not end at {self.lr_min:g}; "
                "set optim.lr_min=0 or optim.schedule=cosine"
            )
        if self.weight_decay_end is not None and not self.weight_decay:
            raise ValueError(
                "optim.weight_decay_end: a schedule from 0 is not known; set optim.weight_decay to "
                "a small number"
            )
        return self


class Engine(Block):
    # Of the forward passes; weights and statistics stay fp32.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # On a GPU, float32 convolutions with 10 bits of mantissa; matrix products keep all 23.
    tf32: bool = True
    # ZeRO, see docs/engine.md; 0: only gradients are exchanged, the fastest for students that fit
    # (all do)
    stage: Literal[0, 1, 2, 3] = 0
    # Gradients are exchanged while the backward runs: at stage 0 by fastdisco, at 1 and 2 on GPUs
    # by DeepSpeed.
    overlap: bool = True
    bucket_mb: float = Field(8.0, gt=0)  # MiB of gradients that are sent at once where they overlap
    deepspeed: dict[str, Any] = {}  # raw DeepSpeed keys, laid over the generated ones

    @model_validator(mode="after")
    def _fp16_at_stage_0(self):
        if self.precision == "fp16" and self.stage:
            raise ValueError(
                f"precision: fp16 works at stage 0 only, found {self.stage} (from stage 1 on "
                "DeepSpeed never lowers the loss scale after an overflow, and clips scaled "
                "gradients); take bf16"
            )
        return self


class Perf(Block):
    graphs: bool = True  # on a GPU, the forwards of mean student and teacher as CUDA graphs
    # torch.compile of the backbones; what it costs and saves is measured and told.
    compile: Literal[False, "student", "teacher", "both"] = False
    backend: str = "inductor"  # of torch.compile
    # cuDNN takes what is fastest here; then a resumed run on a GPU may round otherwise.
    cudnn_benchmark: bool = True


class Eval(Block):
    every: int = Field(0, ge=0)  # steps between kNN evaluations; 0: only after the last step
    k: int = Field(20, ge=1)
    temp: float = Field(0.07, gt=0)  # of the neighbours' weights exp(cos / temp)
    # Training images in the kNN bank, drawn by run.seed; null: all.
    bank: int | None = Field(None, ge=1)


class Log(Block):
    every: int = Field(20, ge=1)  # steps; the loop waits for the device only then


class Checkpoint(Block):
    every: int = Field(1000, ge=1)  # steps
    keep: int = Field(2, ge=1)  # the last ones


class Config(Block):
    run: Run
    data: Data
    view: Crop = Crop()  # what all crops share
    # The crops of an image, laid over `view`; by default the method's, see RECIPES.
    views: tuple[Crops, ...] = Field(min_length=1)
    student: Student = Student()
    # Several, trained side by side from one teacher on the same views; see docs/method.md.
    students: tuple[OneOfMany, ...] = ()
    teacher: Teacher | None = None  # null: no distillation
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
    def _recipe(cls, raw):
        given = raw.get("method", {}) if isinstance(raw, dict) else None
        method = {"name": "moco"} | given if isinstance(given, dict) else {}
        view = raw.get("view") if isinstance(raw, dict) else None
        if (
            not isinstance(method.get("name"), str)
            or method["name"] not in RECIPES
            or not isinstance(view, dict | None)
        ):
            return raw  # refused below
        recipe = RECIPES[method["name"]]
        if raw.get("views") is None:
            own = {key for group in recipe["views"] for key in group}
            if taken := sorted(own & set(view or ())):
                raise ValueError(
                    f"view.{taken[0]}: the crops of {method['name']} have a {taken[0]} of their "
                    f"own; write them out as views, by default {recipe['views']}"
                )
            raw = {k: v for k, v in raw.items() if k != "views"}
        return overlay(recipe, raw | {"method": method})

    @field_serializer("views")
    def _as_given(self, views):
        # Else a group's defaults would hide `view` when read back.
        return [group.model_dump(mode="json", exclude_unset=True) for group in views]

    @model_validator(mode="after")
    def _blocks_agree(self):
        names = student_names(self)
        if twice := [n for n in names if names.count(n) > 1]:
            raise ValueError(
                f"students: {len(twice)} are named {twice[0]}; give each its own, as in students: "
                f"[{{name: ...}}]"
            )
        method, batch, crops = (
            self.method,
            self.data.batch,
            sum(group.count for group in self.views),
        )
        need = {"moco": 2, "seed": 2 if method.name == "seed" and method.contrast else 1}.get(
            method.name
        )
        fits = crops == need if need else crops >= 2
        if not fits:
            raise ValueError(
                f"views: {method.name} takes {need or '2 or more'} crops of an "
                f"image{' here' * bool(need)}, found {crops}; set views=[{{count: {need or 2}}}] "
                "for example"
            )
        if method.name == "seed" and self.teacher is None:
            raise ValueError("teacher.file: SEED learns from a teacher alone; give one")
        if method.name in ("moco", "seed") and method.queue < batch:
            raise ValueError(
                f"method.queue: {method.queue} keys cannot hold one step's {batch} (data.batch); "
                "enlarge it"
            )
        if method.name == "swav" and method.queue % batch:
            raise ValueError(
                f"method.queue: {method.queue} embeddings are no multiple of data.batch {batch}; "
                f"nearest: {method.queue // batch * batch} or {(method.queue // batch + 1) * batch}"
            )
        if self.bn.shuffle == "load" and method.name not in ("moco", "seed"):
            raise ValueError(
                f"bn.shuffle: load hands out other images as view B, and {method.name} compares the "
                "views of an image; set bn.shuffle=off"
            )
        if self.bn.shuffle == "load" and self.teacher and self.teacher.cache != "off":
            raise ValueError(
                "bn.shuffle: load hands out other images as view B, and "
                f"teacher.cache={self.teacher.cache} replays embeddings of whole images; set "
                "bn.shuffle=gather or off"
            )
        if (
            self.engine.stage
            and (freeze := {"swav": "freeze_steps", "dino": "freeze_epochs"}.get(method.name))
            and getattr(method, freeze)
        ):
            raise ValueError(
                f"method.{freeze}: at engine.stage {self.engine.stage} gradients are flat pieces of "
                f"many tensors, and none can be left out of a step; set method.{freeze}=0 or "
                "engine.stage=0"
            )
        if self.engine.stage and self.optim.clip_each:
            raise ValueError(
                f"optim.clip_each: at engine.stage {self.engine.stage} gradients are flat pieces "
                "of many tensors; set it to false"
            )
        if self.data.eval_size > self.data.eval_resize:
            raise ValueError(
                f"data.eval_size: a crop of {self.data.eval_size} does not fit images resized to "
                f"{self.data.eval_resize} (data.eval_resize)"
            )
        if self.optim.warmup_epochs >= self.run.epochs:
            raise ValueError(
                f"optim.warmup_epochs: {self.optim.warmup_epochs:g} leave nothing of the "
                f"{self.run.epochs} epochs (run.epochs); lower it"
            )
        if self.perf.compile in ("student", "both") and self.engine.stage == 3:
            raise ValueError(
                f"perf.compile: {self.perf.compile} works at engine.stage 0 to 2, for at 3 weights "
                "come and go within the forward"
            )
        if self.perf.compile in ("teacher", "both") and self.teacher is None:
            raise ValueError(
                f"perf.compile: {self.perf.compile}, but there is no teacher; set teacher.file, or "
                "student or false"
            )
        if self.perf.compile in ("teacher", "both") and self.teacher.cache != "off":
            raise ValueError(
                f"perf.compile: {self.perf.compile}, but with teacher.cache={self.teacher.cache} "
                "no teacher runs; set student or false"
            )
        if self.eval.every and self.data.val is None:
            raise ValueError(
                "eval.every: the kNN evaluation needs data.val, a folder of class folders"
            )
        return self


def student_names(cfg: Config) -> list[str]:
    return [one.name or one.arch or cfg.student.arch for one in cfg.students]
