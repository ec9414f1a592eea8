"""A data set by its path: class folders, a list file, or tars; without the images that its
quarantine names."""

import glob
import re
from pathlib import Path

import numpy as np

from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.data import folder, shards
from fastdisco.data.folder import Listing

GIVE = "give a folder with one folder of images per class, a folder of tars, or a text file with a line `<image> <class>` for each image"


def listing(source: Path | str, quarantine: Path | str | None = None) -> Listing:
    """The images of a folder of class folders, a list file, a folder of tars, one tar, or tars by a
    pattern like x-{000..099}.tar or x-*.tar.

    quarantine  file with the names to leave out, a tab and the reason after each.  A relative one
                is looked for in the data's folder and holds names relative to it; an absolute one
                must exist and holds absolute names, of this data or other.
    Raises UserError naming the path and the remedy."""
    source = Path(source)
    if source.suffix == ".tar" and not source.is_dir():
        found = shards.load(source, source.parent, _expand(source))
    elif source.is_dir():
        tars = sorted(p.name for p in source.glob("*.tar"))
        if tars and any(p.is_dir() for p in source.iterdir() if not p.name.startswith(".")):
            raise UserError(
                f"{source}: holds tars and also folders; to read the tars give {source}/*.tar, "
                "else move them out"
            )
        packed = tars or any((source / name).exists() for name in (shards.MANIFEST, shards.BEGUN))
        found = shards.load(source, source, tars) if packed else folder.class_folders(source)
    elif source.is_file():
        found = folder.list_file(source)
    else:
        raise UserError(f"{source}: no such folder or file; {GIVE}")
    if quarantine is None:
        return found
    return found._replace(
        left_out=_left_out(found, found.root / quarantine, Path(quarantine).is_absolute())
    )


def same_classes(one: Listing, other: Listing):
    """Raises UserError where the two have other classes: an accuracy of one by the other would mean
    nothing."""
    if one.classes != other.classes:
        odd = sorted(set(one.classes) ^ set(other.classes))
        raise UserError(
            f"{other.source}: its classes are not those of {one.source} "
            f"({f'only in one of them: {shorten(odd)}' if odd else 'in another order'}); give the "
            "two the same"
        )


def read_quarantine(path: Path) -> dict[str, str]:
    """{name: reason}"""
    try:
        lines = path.read_text(errors="surrogateescape").split("\n")
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}); give data.quarantine an existing file"
        ) from None
    return dict(
        (line.split("\t", 1) + [""])[:2] for line in lines if line and not line.startswith("#")
    )


def _left_out(found: Listing, path: Path, absolute: bool) -> np.ndarray:
    if not absolute and not path.exists():
        return found.left_out
    names = list(read_quarantine(path))
    if absolute:
        inside = f"{found.root.resolve()}/"
        names = [n.removeprefix(inside) for n in names if n.startswith(inside)]
    if strange := [n for n in names if n not in found.number]:
        raise UserError(
            f"{path}: names {shorten(strange)}, not in {found.source}; remove the file, or write it "
            f"anew by `fastdisco data check {found.source}`"
        )
    if len(names) == len(found.files):
        raise UserError(f"{path}: names every image of {found.source}; nothing is left to read")
    return np.sort(np.array([found.number[n] for n in names], np.int64))


def _expand(pattern: Path) -> list[str]:
    """Names of the tars of a pattern; its folder is taken as it is."""
    whole = [pattern.name]
    while m := re.search(r"\{(\d+)\.\.(\d+)\}", whole[0]):
        numbers = [f"{i:0{len(m[1])}}" for i in range(int(m[1]), int(m[2]) + 1)]
        whole = [name.replace(m[0], n, 1) for name in whole for n in numbers]
        if not whole:
            raise UserError(f"{pattern}: {m[0]} counts down; write the smaller number first")
    names = []
    for name in whole:
        hits = (
            sorted(glob.glob(name, root_dir=pattern.parent))
            if re.search(r"[*?[]", name)
            else [name] * (pattern.parent / name).is_file()
        )
        if not hits:
            raise UserError(f"{pattern.parent / name}: no such tar; {GIVE}")
        names += hits
    return names
