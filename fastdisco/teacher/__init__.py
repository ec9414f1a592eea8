"""The teacher: a frozen network from a checkpoint, loaded strictly or not at all."""

from pathlib import Path
from typing import Any

from fastdisco import config
from fastdisco.common.errors import UserError
from fastdisco.data import TrainLoader
from fastdisco.teacher import formats
from fastdisco.teacher.cache import CachedTeacher
from fastdisco.teacher.runtime import Options, Teacher, options

__all__ = ["CachedTeacher", "Options", "Teacher", "create", "load", "options", "rounds"]


def create(
    cfg: config.Teacher,
    dim: int,
    precision: str,
    loader: TrainLoader,
    graphs: bool = True,
    teacher_views: int | None = None,
) -> Teacher | CachedTeacher:
    """The teacher itself, or its recorded embeddings (which `complete` records where cfg.cache says
    so); see load, options and CachedTeacher.

    precision: of the engine; graphs: whether there may be any; teacher_views: how many of the first
    views it will be asked about, None: all."""
    run = options(
        cfg,
        precision,
        tuple(dict.fromkeys(c.size for c in loader.crops[:teacher_views])),
        loader.device,
        graphs,
    )
    here = lambda run: load(cfg.file, cfg.arch, cfg.kwargs, dim, run, cfg.student)
    return (
        here(run)
        if cfg.cache == "off"
        else CachedTeacher(cfg, dim, run, loader, here, teacher_views)
    )


def rounds(cfg: config.Teacher | None) -> int | None:
    """Epochs that have views of their own, for the loader; None: all."""
    return cfg.cache_rounds if cfg and cfg.cache != "off" else None


def load(
    file: Path,
    arch: str | None,
    kwargs: dict[str, Any],
    dim: int,
    run: Options = Options(),
    student: str | None = None,
) -> Teacher:
    """The teacher of a checkpoint of the kinds in formats.FORMATS, or of the folder of one of our
    runs (or of one of its checkpoints).

    arch, kwargs  the timm model that its backbone belongs to; None: told by the file
    dim           width of the student's embedding, which the teacher's must have
    run           how and where it runs, see `options`
    student       which one of a run that has several
    Raises UserError naming every weight that is missing, unexpected or of another shape: there is
    no such thing as a random teacher."""
    try:
        net = formats.read(file, arch, kwargs, dim, student).net
    except UserError as e:
        raise UserError(
            f"teacher: {e}; training stops here, for a teacher with random weights is never used"
        ) from None
    return Teacher(net, run)
