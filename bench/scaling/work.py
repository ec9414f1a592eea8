"""What a training step of a configuration asks of a machine, found from the configuration alone."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fastdisco import config, methods, models
from fastdisco.methods import Progress
from scaling.networks import Work, layers

_LAYERS: dict[str, list[Work]] = {}
# Of ImageNet: training and validation images.
TRAIN, VAL = 1_281_167, 50_000


class Job(NamedTuple):
    """A configuration's training.

    student, ema, teacher  layers with one image's work in a step; empty: there is none, or its
                           embeddings are replayed
    precision, teacher_precision  fp32 (TF32 on a GPU), bf16 or fp16
    batch, accumulate      images of a step over all ranks, and in how many micro batches
    bucket                 bytes of gradients that travel together
    overlap                whether they travel while the backward runs
    loss                   floating-point operations an image
    optimizer              bytes that the update of student and EMA reads and writes
    keys                   bytes an image that all ranks gather, embeddings and keys
    images                 bytes an image that all ranks gather for bn.shuffle: gather
    small                  bytes of each further collective of a micro batch
    every_save, saved      steps between checkpoints, bytes of one
    every_eval, evaluated  steps between evaluations, images of one over all ranks"""

    student: list[Work]
    ema: list[Work]
    teacher: list[Work]
    precision: str
    teacher_precision: str
    batch: int
    accumulate: int
    bucket: float
    overlap: bool
    loss: float
    optimizer: float
    keys: float
    images: float
    small: list[float]
    every_save: int
    saved: float
    every_eval: int
    evaluated: int


def job(cfg: config.Config) -> Job:
    """The job of a configuration, as train.py would run it on GPUs."""
    crops, method = config.crops(cfg), _method(cfg)
    has_ema = method.momentum(Progress(0, 0.0)) is not None
    half = cfg.engine.precision != "fp32"
    live = cfg.teacher is not None and cfg.teacher.cache == "off"
    # Without distillation MoCo shows the student the first view only; SEED always does.
    seen = crops[: _student_views(cfg)]
    dim = cfg.student.dim
    student = _student(cfg, seen)
    size = weights(student)
    return Job(
        student=student,
        ema=_student(cfg, _ema_crops(cfg, crops)) if has_ema else [],
        teacher=_teacher(cfg, crops[: method.teacher_views]) if live else [],
        precision=cfg.engine.precision,
        teacher_precision=_teacher_precision(cfg),
        batch=cfg.data.batch,
        accumulate=cfg.data.accumulate,
        bucket=cfg.engine.bucket_mb * 2**20,
        overlap=cfg.engine.overlap,
        # Forward and two backwards of the rows against queue or prototypes.
        loss=3 * 2 * dim * _rows(cfg) * len(seen),
        # SGD reads weight, gradient and momentum and writes two of them; the EMA reads two, writes one.
        optimizer=4 * size * (5 + 3 * has_ema),
        keys=_gathered(cfg, dim),
        images=_shuffled(cfg, crops, half),
        small=_small(cfg),
        every_save=cfg.checkpoint.every,
        saved=4 * size * (2 + has_ema),
        every_eval=cfg.eval.every,
        evaluated=(cfg.eval.bank or TRAIN) + VAL,
    )


def weights(net: list[Work]) -> int:
    return sum(x.weights for x in net)


def _method(cfg: config.Config) -> methods.Method:
    with torch.device("meta"):
        return methods.create(
            cfg.method.name, cfg=cfg.method, dim=cfg.student.dim, seed=0, shuffle=cfg.bn.shuffle
        )


def _student(cfg: config.Config, crops: list[config.Crop]) -> list[Work]:
    def made() -> nn.Module:
        with torch.device("meta"):
            return models.of(cfg, train=True)

    return _known((cfg.student, cfg.bn, getattr(cfg.method, "prototypes", 0)), crops, made)


def _teacher(cfg: config.Config, crops: list[config.Crop]) -> list[Work]:
    """With a head of the embedding's width."""
    teacher = cfg.teacher
    assert teacher
    if teacher.arch is None:
        raise config.UserError(
            f"teacher.arch: the model opens no file, and {teacher.file} would tell it; "
            "name the timm model"
        )

    def made() -> nn.Module:
        with torch.device("meta"):
            head = lambda dim: nn.Linear(dim, cfg.student.dim)
            return models.create(teacher.arch, head, teacher.kwargs).eval()

    return _known((teacher.arch, teacher.kwargs, cfg.student.dim), crops, made)


def _known(what: tuple, crops: list[config.Crop], make: Callable[[], nn.Module]) -> list[Work]:
    """The layers, looked for once: configurations share their networks."""
    key = repr((what, sorted(c.size for c in crops)))
    if key not in _LAYERS:
        _LAYERS[key] = layers(make(), crops)
    return _LAYERS[key]


def _teacher_precision(cfg: config.Config) -> str:
    """`auto` is fp16 on a GPU."""
    asked = cfg.teacher.precision if cfg.teacher else "auto"
    return "fp16" if asked == "auto" else asked


def _student_views(cfg: config.Config) -> int | None:
    name = cfg.method.name
    alone = name == "moco" and not (cfg.teacher and cfg.method.distill)
    return 1 if name == "seed" or alone else None


def _ema_crops(cfg: config.Config, crops: list[config.Crop]) -> list[config.Crop]:
    """Moco and SEED: the second view; DINO: the two large ones."""
    return crops[:2] if cfg.method.name == "dino" else crops[1:2]


def _rows(cfg: config.Config) -> int:
    """Rows that an embedding is compared with."""
    return getattr(cfg.method, "prototypes", 0) or getattr(cfg.method, "queue", 0)


def _gathered(cfg: config.Config, dim: int) -> float:
    """Bytes an image: MoCo's keys, SEED's targets and keys, SwAV's rows of two views."""
    name = cfg.method.name
    if name == "seed":
        return 4 * dim * (2 if cfg.method.contrast else 1)
    return {"moco": 4 * dim, "swav": 2 * 4 * dim, "dino": 0}[name]


def _shuffled(cfg: config.Config, crops: list[config.Crop], half: bool) -> float:
    """Bytes an image that the batch shuffle sends: view B in the precision of the views."""
    keys = cfg.method.name == "moco" or (cfg.method.name == "seed" and cfg.method.contrast > 0)
    if not keys or cfg.bn.shuffle != "gather":
        return 0.0
    return (2 if half else 4) * 3 * crops[1].size ** 2


def _small(cfg: config.Config) -> list[float]:
    """SwAV: an all-gather of log sums for each iteration of Sinkhorn-Knopp; DINO: the centre."""
    if cfg.method.name == "swav":
        return [2 * 4 * cfg.method.prototypes] * cfg.method.iterations
    return [4 * cfg.method.prototypes] if cfg.method.name == "dino" else []
