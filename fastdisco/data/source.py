"""A data set by its path: class folders, a list file or tars, without the images that its
quarantine names."""

import glob
import re
from pathlib import Path

import numpy as np

from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.data import folder, shards
from fastdisco.data.folder import Listing

REMEDY = (
    "give a folder with one folder of images per class, a folder of tars, or a text file with a "
    "line `<image> <class>` for each image"
)


def listing(source: Path | str, quarantine: Path | str | None = None) -> Listing:
    """The images of a folder of class folders, a list file, a folder of tars, one tar, or tars by a
    pattern like x-{000..099}.tar or x-*.tar.

    quarantine  a file with the images to leave out, in each line a name, a tab and the reason.
                A relative path is looked up in the data's folder, need not exist, and holds names
                relative to that folder.  An absolute path must exist and holds absolute names, of
                this data or of other data.
    Raises UserError naming the path and the remedy."""
    source = Path(source)
    if source.is_dir():
        found = _folder(source)
    elif source.suffix == ".tar":
        found = shards.load(source, source.parent, _expand(source))
    elif source.is_file():
        found = folder.list_file(source)
    else:
        raise UserError(f"{source}: no such folder or file; {REMEDY}")
    if quarantine is None:
        return found
    path, absolute = found.root / quarantine, Path(quarantine).is_absolute()
    return found._replace(left_out=_left_out(found, path, absolute))


def same_classes(one: Listing, other: Listing) -> None:
    """Raises UserError where the two have other classes: an accuracy of one by the other would mean
    nothing."""
    if one.classes != other.classes:
        odd = sorted(set(one.classes) ^ set(other.classes))
        how = f"only in one of them: {shorten(odd)}" if odd else "in another order"
        raise UserError(
            f"{other.source}: its classes are not those of {one.source} ({how}); give the two the "
            "same"
        )


def read_quarantine(path: Path) -> dict[str, str]:
    """{name: reason}; empty lines and lines from `#` on are passed over."""
    try:
        lines = path.read_text(errors="surrogateescape").split("\n")
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}); give data.quarantine an existing file"
        ) from None
    reasons = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, _, reason = line.partition("\t")
            reasons[name] = reason
    return reasons


def _folder(source: Path) -> Listing:
    """Tars, where there are any or a manifest of them, else class folders."""
    # Not those that begin with a dot: macOS puts a ._x.tar beside x.tar.
    tars = sorted(glob.glob("*.tar", root_dir=source))
    if tars and any(p.is_dir() for p in source.iterdir() if not p.name.startswith(".")):
        raise UserError(
            f"{source}: holds tars and also folders; to read the tars give {source}/*.tar, else "
            "move them out"
        )
    # A manifest without tars: `shards.load` says what is missing.
    packed = any((source / name).exists() for name in (shards.MANIFEST, shards.BEGUN))
    return shards.load(source, source, tars) if tars or packed else folder.class_folders(source)


def _left_out(found: Listing, path: Path, absolute: bool) -> np.ndarray:
    """Indices of the images that the quarantine names, ascending."""
    if not absolute and not path.exists():
        return found.left_out
    names = list(read_quarantine(path))
    if absolute:
        # One file may serve several data sets: only names in this one's root count.
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
    """Names of the tars that a pattern means; only its last part is a pattern, its folder is taken
    literally."""
    whole = [pattern.name]
    # {000..099} by hand, once for each pair of braces; the shell's wildcards by glob.
    while m := re.search(r"\{(\d+)\.\.(\d+)\}", whole[0]):
        numbers = [f"{i:0{len(m[1])}}" for i in range(int(m[1]), int(m[2]) + 1)]
        whole = [name.replace(m[0], n, 1) for name in whole for n in numbers]
        if not whole:
            raise UserError(f"{pattern}: {m[0]} counts down; write the smaller number first")
    names = []
    for name in whole:
        if re.search(r"[*?[]", name):
            hits = sorted(glob.glob(name, root_dir=pattern.parent))
        else:
            hits = [name] if (pattern.parent / name).is_file() else []
        if not hits:
            raise UserError(f"{pattern.parent / name}: no such tar; {REMEDY}")
        names += hits
    return names
