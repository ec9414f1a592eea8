"""The teacher: a frozen network from a checkpoint, loaded strictly or not at all."""
from pathlib import Path
from typing import Any

import torch

from fastdisco.config import UserError
from fastdisco.teacher import formats
from fastdisco.teacher.runtime import Teacher

__all__ = ["Teacher", "load"]


def load(file: Path, arch: str, kwargs: dict[str, Any], dim: int, device: torch.device | str, student: str | None = None) -> Teacher:
    """The teacher of a checkpoint of the kinds in formats.FORMATS, or of the folder of one of our runs (or of one of its checkpoints).

    arch, kwargs  the timm model that its backbone belongs to
    dim           width of the student's embedding, which the teacher's must have
    student       which one of a run that has several
    Raises UserError naming every weight that is missing, unexpected or of another shape: there is no such thing as a random teacher."""
    file = Path(file)
    try:
        net = formats.from_run(file, arch, kwargs, dim, student) if file.is_dir() else formats.from_file(file, arch, kwargs, dim)
    except UserError as e:
        raise UserError(f"teacher: {e}; training stops here, for a teacher with random weights is never used") from None
    return Teacher(net.to(device))
