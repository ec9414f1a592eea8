"""The teacher: a frozen network from a checkpoint, loaded strictly or not at all."""
from pathlib import Path
from typing import Any

import torch

from fastdisco.config import UserError
from fastdisco.teacher import formats
from fastdisco.teacher.runtime import Teacher

__all__ = ["Teacher", "load"]


def load(file: Path, arch: str | None, kwargs: dict[str, Any], dim: int, device: torch.device | str) -> Teacher:
    """The teacher of a checkpoint of the kinds in formats.FORMATS, or of the folder of one of our runs (or of one of its checkpoints).

    arch, kwargs  the timm model that its backbone belongs to; None: told by the file
    dim           width of the student's embedding, which the teacher's must have
    Raises UserError naming every weight that is missing, unexpected or of another shape: there is no such thing as a random teacher."""
    try:
        net = formats.read(file, arch, kwargs, dim).net
    except UserError as e:
        raise UserError(f"teacher: {e}; training stops here, for a teacher with random weights is never used") from None
    return Teacher(net.to(device))
