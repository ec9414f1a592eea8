"""The teacher: a frozen network from a checkpoint, loaded strictly or not at all.

formats.py      what a teacher can be read from;  layouts.py  what a checkpoint is, by its keys;
                architectures.py, head_kinds.py  by its shapes;  strangers.py  what is not read
runtime.py      how the teacher runs: half precision, CUDA graph
fold.py         batch norm folded into the layers before it
cache.py        recorded embeddings in the teacher's place;  cache_files.py  their files

Level 2: may import levels 0 and 1, but neither methods nor evals."""

from collections.abc import Mapping
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
    """The teacher itself or, where cfg.cache says so, its recorded embeddings, which
    `CachedTeacher.complete` records.

    dim            width of the student's embedding, which the teacher's must have
    precision      of the engine
    graphs         whether there may be CUDA graphs
    teacher_views  how many of the first views it will be asked about; None: all
    Raises the errors of `load`, `options` and `CachedTeacher`."""
    sizes = dict.fromkeys(crop.size for crop in loader.crops[:teacher_views])
    run = options(cfg, precision, tuple(sizes), loader.device, graphs)

    def loaded(run: Options) -> Teacher:
        return load(cfg.file, cfg.arch, cfg.kwargs, dim, run, cfg.student, cfg.sha256)

    if cfg.cache == "off":
        return loaded(run)
    return CachedTeacher(cfg, dim, run, loader, loaded, teacher_views)


def rounds(cfg: config.Teacher | None) -> int | None:
    """How many epochs have views of their own, for the loader; None: every epoch."""
    return cfg.cache_rounds if cfg and cfg.cache != "off" else None


def load(
    file: Path,
    arch: str | None,
    kwargs: Mapping[str, Any] | None,
    dim: int,
    run: Options | None = None,
    student: str | None = None,
    sha256: str | None = None,
) -> Teacher:
    """The teacher from a checkpoint of the kinds in layouts.FORMATS, or from the folder of one of our
    runs (or of one of its checkpoints).

    arch, kwargs  the timm model that its backbone belongs to; None: the file tells
    dim           width of the student's embedding, which the teacher's must have
    run           how and where it runs, see `options`; None: on the CPU, as it was loaded
    student       the name of one, for a run that has several
    sha256        of the file; None: not compared
    Raises UserError naming every weight that is missing, unexpected or of another shape: there is
    no such thing as a random teacher."""
    try:
        formats.refuse_other(file, sha256)
        net = formats.read(file, arch, kwargs, dim, student).net
    except UserError as e:
        raise UserError(
            f"teacher: {e}; training stops here, for a teacher with random weights is never used"
        ) from None
    return Teacher(net, run)
