"""Class folders: which images there are, in a fixed order."""
import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdisco.config import UserError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm", ".jp2")  # what DALI decodes


class _Listing(NamedTuple):
    root: Path
    files: list[str]  # relative to root, sorted within sorted classes: an image's place here is its index
    labels: np.ndarray  # int64 [N], positions in classes
    classes: list[str]


class Listing(_Listing):
    """The images of a folder of class folders."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256, hex, over names and labels: equal listings give equal indices and so equal views."""
        digest = hashlib.sha256("\n".join(self.files).encode(errors="surrogateescape"))
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


def listing(root: Path | str) -> Listing:
    """All images below the class folders of `root`, which is how torchvision's ImageFolder reads it.  Links to folders are not followed.

    Raises UserError where the folder is missing, holds no class folders, or a class holds no image."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give data.train and data.val folders that hold one folder of images for each class"
                        if not root.exists() else f"{root}: is a file; give the folder that holds the class folders")
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir(follow_symlinks=False))
    if not classes:
        flat = any(e.name.lower().endswith(EXTENSIONS) for e in os.scandir(root))
        raise UserError(f"{root}: holds no class folders{', its images lie flat' if flat else ''}; move the images into one folder for each class "
                        "(a single folder will do where there are no classes)")
    files, labels, empty = [], [], []
    for label, name in enumerate(classes):
        found = sorted(_images(root / name, name))
        files += found
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    if not files:
        raise UserError(f"{root}: its {len(classes)} class folders hold no image ({', '.join(EXTENSIONS)}); check the path")
    if empty:
        raise UserError(f"{root}: {len(empty)} of {len(classes)} class folders hold no image ({', '.join(empty[:3])}{' ...' if empty[3:] else ''}); "
                        "fill or remove them")
    return Listing(root, files, np.array(labels, dtype=np.int64), classes)


def _images(folder: Path, prefix: str):
    for e in os.scandir(folder):
        if e.is_dir(follow_symlinks=False):
            yield from _images(folder / e.name, f"{prefix}/{e.name}")
        elif e.name.lower().endswith(EXTENSIONS):
            yield f"{prefix}/{e.name}"
