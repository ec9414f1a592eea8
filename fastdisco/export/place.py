"""The folder of an export: files are made beside it and take their places together, and none of other
weights stays among them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdisco.common.errors import UserError
from fastdisco.common.files import read_json

ABOUT = "export.json"
# All that an export writes; what was not written anew goes when the weights are others.
NAMES = (
    "model.safetensors",
    "config.json",
    "head.safetensors",
    "torchvision.pth",
    "detectron2.pth",
    "model.onnx",
    "model.int8.onnx",
    "model.int8.onnx.rejected",
    "bench.json",
    "README.md",
    "eval",
    ABOUT,
)
# A file that was rejected and one that was not do not stand beside each other.
_EITHER = {
    "model.int8.onnx": "model.int8.onnx.rejected",
    "model.int8.onnx.rejected": "model.int8.onnx",
}


def earlier(folder: Path, fingerprint: str) -> dict[str, Any]:
    """What an earlier export of the same weights wrote into export.json; {} without one.

    Raises UserError where the folder holds files and no export."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder as --out")
    about = folder / ABOUT
    if not about.is_file():
        if folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise UserError(
                f"{folder}: holds files but no export (no {ABOUT}), so nothing is written there; "
                "give another --out"
            )
        return {}
    try:
        found = read_json(about)
        same = found["network"]["fingerprint"] == fingerprint
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{about}: is damaged; delete it, or give another --out") from None
    return found if same else {}


@contextmanager
def staged(folder: Path, keep: bool) -> Iterator[Path]:
    """A folder for files that take their places in `folder` when the block ends without an error;
    otherwise nothing there changes.

    keep: the folder's other files are of the same weights and stay"""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.part")
    stage.mkdir()
    try:
        yield stage
        folder.mkdir(exist_ok=True)
        # First: until the new one is there, the folder does not claim to be whole.
        made = sorted((p.name for p in stage.iterdir()), key=lambda name: name == ABOUT)
        for name in NAMES:
            if name not in made and (not keep or _EITHER.get(name) in made):
                _remove(folder / name)
        for name in made:
            _replace(stage / name, folder / name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace(new: Path, old: Path) -> None:
    if new.is_dir():
        old.mkdir(exist_ok=True)
        for path in new.iterdir():
            _remove(old / path.name)
            os.replace(path, old / path.name)
    else:
        os.replace(new, old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
