"""The configuration: every key, its default and its check; YAML in, one validated Config out."""
import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from fastdisco.views import Crop


class UserError(Exception):
    """One sentence for the user: what was found, where, and what to do.  Commands print it and exit with 2."""


class Block(BaseModel, extra="forbid", frozen=True, validate_default=True):
    pass


class Run(Block):
    name: str  # outputs go to out/name/
    out: Path = Path("out")
    seed: int = Field(0, ge=0, lt=2**32)  # of weights, order, views and shuffles
    epochs: int = Field(200, ge=1)
    max_steps: int | None = Field(None, ge=1)  # stop here although the schedule is made for all epochs

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name):
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise ValueError("one folder name of letters, digits and . _ + -")
        return name


class Data(Block):
    train: Path  # a folder of class folders, a list file, or tars: see docs/data.md
    val: Path | None = None  # the same; needed by the kNN evaluation
    quarantine: Path | None = Path("quarantine.txt")  # names of images to leave out; looked for in the folders of train and val.  null: none
    batch: int = Field(256, ge=1)  # images per optimizer step, over all ranks and accumulated micro batches
    accumulate: int = Field(1, ge=1)  # micro batches per step
    threads: int = Field(4, ge=1)  # DALI's CPU threads on each rank
    eval_resize: int = Field(256, ge=8)  # short side before the centre crop
    eval_size: int = Field(224, ge=8)  # side of the centre crop
    eval_batch: int = Field(128, ge=1)  # images per rank


class Student(Block):
    arch: str = "mobilenetv3_large_100"  # any timm model
    hidden: int = Field(2048, ge=0)  # width of the projection head's hidden layer; 0: a single linear layer
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
    file: Path  # a MoCo-v2 .pth.tar, or the folder of a fastdisco run
    arch: str = "resnet50"  # the timm model that the file's backbone belongs to
    kwargs: dict[str, Any] = {}  # handed to timm.create_model
    student: str | None = None  # which of the students of a fastdisco run that has several


class Bn(Block):
    groups: int = Field(1, ge=1)  # batch-norm statistics over 1/groups of a rank's micro batch, as `groups` GPUs would have them
    # How the key encoder sees the batch permuted over ranks and groups (MoCo, section 3.3): gather sends the images around, load has each rank
    # load its share of the permuted batch instead, for all networks (docs/method.md); true and false are read as gather and off.
    shuffle: Literal["gather", "load", "off"] = "gather"

    @field_validator("shuffle", mode="before")
    @classmethod
    def _switch(cls, value):
        return {True: "gather", False: "off"}[value] if isinstance(value, bool) else value  # YAML reads a bare off as false


class Moco(Block):
    name: Literal["moco"] = "moco"
    temp: float = Field(0.2, gt=0)
    queue: int = Field(65536, ge=1)  # keys
    queue_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 on a GPU, whose tensor cores want it, else fp32
    momentum: float = Field(0.999, ge=0, le=1)  # of the mean student (EMA)
    contrast: float = Field(1.0, ge=0)  # weight of the InfoNCE term
    distill: float = Field(32.0, ge=0)  # weight of ||s-t||^2, mean over images, sum over views: the paper's, see docs/method.md


class Optim(Block):
    name: str = "sgd"  # any name of timm.optim
    lr: float = Field(0.03, ge=0)
    lr_scale: Literal["none", "linear", "sqrt"] = "none"  # lr times (data.batch / 256), or its root
    momentum: float = 0.9
    weight_decay: float = Field(1e-4, ge=0)
    decay_norm_and_bias: bool = True  # as MoCo and DisCo do
    clip: float = Field(0.0, ge=0)  # norm of the gradient; 0: off
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    per: Literal["step", "epoch"] = "step"  # how often the schedule moves
    warmup_epochs: float = Field(0.0, ge=0)
    milestones: tuple[int, ...] = (120, 160)  # epochs at which `step` multiplies lr by 0.1


class Engine(Block):
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward passes; weights and statistics stay fp32
    stage: Literal[0, 1, 2, 3] = 0  # ZeRO, see docs/engine.md; 0: only gradients are exchanged, the fastest for students that fit (all do)
    overlap: bool = True  # gradients are exchanged while the backward runs: at stage 0 by fastdisco, at 1 and 2 on GPUs by DeepSpeed
    bucket_mb: float = Field(8.0, gt=0)  # MiB of gradients that are sent at once where they overlap
    deepspeed: dict[str, Any] = {}  # raw DeepSpeed keys, laid over the generated ones

    @model_validator(mode="after")
    def _scaled(self):
        if self.precision == "fp16" and self.stage:
            raise ValueError(f"precision: fp16 works at stage 0 only, found {self.stage} (from stage 1 on DeepSpeed never lowers the loss scale "
                             "after an overflow, and clips scaled gradients); take bf16")
        return self


class Eval(Block):
    every: int = Field(0, ge=0)  # steps between kNN evaluations; 0: only after the last step
    k: int = Field(20, ge=1)
    temp: float = Field(0.07, gt=0)  # of the neighbours' weights exp(cos / temp)
    bank: int | None = Field(None, ge=1)  # training images in the kNN bank, drawn by run.seed; null: all


class Log(Block):
    every: int = Field(20, ge=1)  # steps; the loop waits for the device only then


class Checkpoint(Block):
    every: int = Field(1000, ge=1)  # steps
    keep: int = Field(2, ge=1)  # the last ones


class Config(Block):
    run: Run
    data: Data
    view: Crop = Crop()
    student: Student = Student()
    students: tuple[OneOfMany, ...] = ()  # several, trained side by side from one teacher on the same views; see docs/method.md
    teacher: Teacher | None = None  # null: no distillation
    bn: Bn = Bn()
    method: Moco = Moco()
    optim: Optim = Optim()
    engine: Engine = Engine()
    eval: Eval = Eval()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="after")
    def _fits(self):
        names = _names(self)
        if twice := [n for n in names if names.count(n) > 1]:
            raise ValueError(f"students: {len(twice)} are named {twice[0]}; give each its own, as in students: [{{name: ...}}]")
        if self.method.queue < self.data.batch:
            raise ValueError(f"method.queue: {self.method.queue} keys cannot hold one step's {self.data.batch} (data.batch); enlarge it")
        if self.data.eval_size > self.data.eval_resize:
            raise ValueError(f"data.eval_size: a crop of {self.data.eval_size} does not fit images resized to {self.data.eval_resize} (data.eval_resize)")
        if self.optim.warmup_epochs >= self.run.epochs:
            raise ValueError(f"optim.warmup_epochs: {self.optim.warmup_epochs:g} leave nothing of the {self.run.epochs} epochs (run.epochs); lower it")
        if self.eval.every and self.data.val is None:
            raise ValueError("eval.every: the kNN evaluation needs data.val, a folder of class folders")
        return self


def load(path: Path | str, overrides: list[str] = ()) -> Config:
    """Config of a YAML file with `block.key=value` overrides laid over it; value is YAML (`1e-3` is a number, `null` is none).

    Raises UserError naming the file or override, the key, what is wrong and, for an unknown key, the nearest right one."""
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader) or {}
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); give --config an existing YAML file") from None
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no blocks; start from one of the files in configs/")
    for item in overrides:
        _override(raw, item)
    return validate(raw, path)


def validate(raw: dict, source: Path | str) -> Config:
    """Config of nested dicts; `source` is named in the error."""
    try:
        return Config.model_validate(raw)
    except ValidationError as e:
        raise UserError(f"{source}: " + "; ".join(_sentence(err) for err in e.errors())) from None


def students(cfg: Config) -> dict[str, Config]:
    """The configuration that each student would have alone, by name; without `students` the one there is, named ''."""
    return {name: cfg.model_copy(update={
        "students": (),
        "student": cfg.student.model_copy(update={k: v for k in ("arch", "hidden", "kwargs") if (v := getattr(one, k)) is not None}),
        "optim": cfg.optim.model_copy(update={} if one.lr is None else {"lr": one.lr}),
    }) for name, one in zip(_names(cfg), cfg.students)} or {"": cfg}


def dump(cfg: Config) -> str:
    """The whole resolved configuration as YAML that `load` reads back to an equal Config."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)


def flatten(d: dict, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; empty dicts stay values."""
    out = {}
    for k, v in d.items():
        out |= flatten(v, f"{prefix}{k}.") if isinstance(v, dict) and v else {f"{prefix}{k}": v}
    return out


def micro_batch(cfg: Config, world: int) -> int:
    """Images per rank and forward pass: the one place where the global batch is divided."""
    parts = world * cfg.data.accumulate
    batch, rest = divmod(cfg.data.batch, parts)
    if rest:
        near = [n for n in (batch * parts, (batch + 1) * parts) if n]
        raise UserError(f"data.batch: {cfg.data.batch} does not divide by {world} ranks x {cfg.data.accumulate} accumulated; "
                        f"nearest: {' or '.join(map(str, near))}")
    if batch % cfg.bn.groups:
        raise UserError(f"bn.groups: {cfg.bn.groups} does not divide the {batch} images of a rank's micro batch; take a divisor of {batch}")
    if batch // cfg.bn.groups < 2:
        raise UserError("data.batch: batch norm sees 1 image in each group and needs 2; enlarge data.batch or lower bn.groups")
    return batch


def _names(cfg: Config) -> list[str]:
    return [one.name or one.arch or cfg.student.arch for one in cfg.students]


def _override(raw: dict, item: str):
    key, eq, value = item.partition("=")
    if not eq or not key:
        raise UserError(f"override '{item}': expected block.key=value, for example optim.lr=0.06")
    *blocks, last = key.split(".")
    node = raw
    for b in blocks:
        if not isinstance(node.get(b), dict):  # absent, or null as in `teacher: null`
            node[b] = {}
        node = node[b]
    try:
        node[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"override '{item}': the value is not valid YAML") from None


def _sentence(err: dict) -> str:
    loc = [str(p) for p in err["loc"]]
    name = ".".join(loc)
    if err["type"] == "extra_forbidden":
        known = _keys_at(loc[:-1])
        near = [k for k in flatten(_tree(Config)) if k.split(".")[-1] == loc[-1]]  # the right key in the wrong block
        near = near or [".".join(loc[:-1] + [k]) for k in difflib.get_close_matches(loc[-1], known, 1, 0.5)]
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {name}; {hint}"
    msg = err["msg"].removeprefix("Value error, ")
    if err["type"] == "missing":
        return f"{name} is required"
    return f"{name}: {msg} (found {err['input']!r})" if name else msg


def _model_of(field) -> type[BaseModel] | None:
    kinds = getattr(field.annotation, "__args__", None) or (field.annotation,)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _keys_at(loc: list[str]) -> list[str]:
    model = Config
    for part in loc:
        model = model if part.isdigit() else _model_of(model.model_fields[part])  # a number: the place in a list
    return list(model.model_fields)


def _tree(model: type[BaseModel]) -> dict:
    return {k: _tree(m) if (m := _model_of(f)) else None for k, f in model.model_fields.items()}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; here it is a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
