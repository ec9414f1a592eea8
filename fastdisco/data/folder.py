"""A folder of class folders as a list of files and labels."""
import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdisco.config import UserError

EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "tif", "tiff", "webp", "jp2", "pnm", "ppm", "pgm", "pbm")  # what DALI decodes


class _Listing(NamedTuple):
    root: Path
    files: list[str]  # relative to root, `/` between the parts
    labels: np.ndarray  # [N] int64
    classes: list[str]


class Listing(_Listing):
    """Images in their fixed order: the position of an image here is its index everywhere."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over names and labels, not over the root: a moved folder is the same data."""
        text = "\0".join(self.files) + "\0" + " ".join(map(str, self.labels.tolist()))
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()  # names are bytes, not always UTF-8


def listing(root: Path | str) -> Listing:
    """The images of root/<class>/**, classes and the files of a class sorted by name, which are torchvision's labels.

    Names that begin with a dot are passed over, as are files without an image's extension; links to files are followed, links to folders
    are refused, since they can lead out of the root or round in a circle.  Raises UserError naming the path and the remedy."""
    root = Path(root)
    if not root.exists():
        raise UserError(f"{root}: no such folder; give the folder that holds one folder of images per class")
    if not root.is_dir():
        raise UserError(f"{root}: is a file; give the folder that holds one folder of images per class")
    classes, flat = _scan(root)
    if not classes:
        found = f"{len(flat)} images lie in it directly" if flat else "it is empty of images"
        raise UserError(f"{root}: no class folders, {found}; put the images into one folder per class, {root}/<class>/<image>")
    files, labels, empty = [], [], []
    for label, name in enumerate(classes):
        inside = _images(root, name)
        files += inside
        labels += [label] * len(inside)
        if not inside:
            empty.append(name)
    known = " ".join(EXTENSIONS)
    if not files:
        raise UserError(f"{root}: {len(classes)} class folders and not one image; add files with one of the extensions {known}")
    if empty:
        names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise UserError(f"{root}: no image in the class folder{'s' * (len(empty) > 1)} {names}; remove or fill (extensions: {known})")
    return Listing(root, files, np.array(labels, np.int64), classes)


def _images(root: Path, folder: str) -> list[str]:
    """A folder's own images by name, then those of its folders."""
    folders, files = _scan(root / folder)
    out = [f"{folder}/{name}" for name in files]
    for name in folders:
        out += _images(root, f"{folder}/{name}")
    return out


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """Names of sub-folders and of images, each sorted; a directory entry knows its kind, so a file costs no stat."""
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for e in entries:
                if e.name.startswith("."):
                    continue
                if e.is_dir(follow_symlinks=False):
                    folders.append(e.name)
                elif e.is_symlink() and e.is_dir():
                    raise UserError(f"{e.path}: a link to a folder is not followed; put the folder itself in its place, or a folder of links to files")
                elif e.name.rpartition(".")[2].lower() in EXTENSIONS:
                    files.append(e.name)
    except OSError as err:
        raise UserError(f"{folder}: cannot be read ({err.strerror}); allow reading it") from None
    return sorted(folders), sorted(files)
