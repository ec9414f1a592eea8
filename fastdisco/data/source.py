"""A data set by its path: class folders, a list file or tars, without the images that its
quarantine names."""

import fnmatch
import glob
import os
import re
from pathlib import Path

import numpy as np

from fastdisco import config
from fastdisco.common.console import say, shorten
from fastdisco.common.errors import UserError
from fastdisco.common.urls import Url, addressed
from fastdisco.data import folder, lines, shards
from fastdisco.data.folder import Listing
from fastdisco.data.remote import Store

# Validation images that are looked for among the training images of their class, and how many of
# these there may be: each is asked for its size.
LOOKED, SEARCHED = 8, 20_000
WILD = re.compile(r"[*?[]")
REMEDY = (
    "give a folder with one folder of images per class, a folder of tars, or a text file with a "
    "line `<image> <class>` for each image"
)


def listing(
    source: Path | str,
    quarantine: Path | str | None = None,
    bare: bool = False,
    images: config.Data | None = None,
) -> Listing:
    """The images of a folder of class folders, a list file, a folder of tars, one tar, or tars by a
    pattern like x-{000..099}.tar or x-*.tar; tars may lie in object storage, s3://bucket/folder.

    quarantine  a file with the images to leave out, in each line a name, a tab and the reason.
                Names that are not in this data are passed over and told.
                A relative path is looked up in the data's folder, need not exist, and holds names
                relative to that folder.  An absolute path must exist and holds absolute names, of
                this data or of other data.
    bare        whether images without classes are taken, too: a folder with images alone, and a
                list of names alone; they are of one class
    images      where the cache of object storage is, and its size; None: the defaults
    Raises UserError naming the path and the remedy."""
    source = addressed(source)
    if isinstance(source, Url):
        found = _remote(source, quarantine, images)
    elif source.is_dir():
        found = (folder.flat(source) if bare else None) or _folder(source)
    elif source.suffix == ".tar":
        found = shards.load(source, source.parent, _expand(source, _Folder(source.parent)))
    elif source.is_file():
        found = folder.list_file(source, bare)
    else:
        raise UserError(f"{source}: no such folder or file; {REMEDY}")
    _refuse_bytes(found)
    if quarantine is None:
        return found
    path, absolute = found.root / quarantine, Path(quarantine).is_absolute()
    return found._replace(left_out=_left_out(found, path, absolute))


def same_classes(one: Listing, other: Listing) -> None:
    """Raises UserError where the two have other classes: an accuracy of one by the other would mean
    nothing."""
    if one.classes == other.classes:
        return
    odd = sorted(set(one.classes) ^ set(other.classes))
    how = f"only in one of them: {shorten(odd)}" if odd else "in another order"
    remedy = "give the two the same"
    numbered, named = sorted((one, other), key=lambda x: not _numbered(x))
    if _numbered(numbered) and not _numbered(named):
        how = f"those of {numbered.source} are numbers"
        remedy = f"write the names instead of the numbers: {shorten(named.classes)}"
    raise UserError(f"{other.source}: its classes are not those of {one.source} ({how}); {remedy}")


def apart(
    train: Listing, val: Listing, remedy: str = "give data.val other images, or null"
) -> None:
    """Raises UserError where images of `val` are images of `train`: each would be its own nearest
    neighbour.  The same image is the same file, also by links to a folder, or a whole copy."""
    shared = len(val.kept) if _is_copy(train, val) else _same_files(train, val)
    if shared:
        raise UserError(
            f"{val.source}: {shared} of its {len(val.kept)} images are also images of "
            f"{train.source}, so each finds itself and the kNN accuracy would mean nothing; {remedy}"
        )


def no_copies(
    train: Listing, val: Listing, remedy: str = "give data.val other images, or null"
) -> None:
    """Looks at eight images of `val`, in whatever files they are.  Raises UserError where each is, byte
    for byte, a training image of its class; where only some are, that is said.

    Files alone are compared: an image that was written anew is not found."""
    if train.classes != val.classes:
        return
    places = np.linspace(0, len(val.kept) - 1, min(LOOKED, len(val.kept))).astype(int)
    found = [_is_in(train, val, i) for i in val.kept[places].tolist()]
    if not any(found):
        return
    told = (
        f"{val.source}: {sum(found)} of {len(found)} images of it that were looked at are also, byte "
        f"for byte, images of {train.source}"
    )
    if not all(found):
        say(f"{told}; numbers are too high by as much as these find themselves")
        return
    raise UserError(f"{told}, so each finds itself and an accuracy would mean nothing; {remedy}")


def read_quarantine(path: Path) -> dict[str, str]:
    """{name: reason}; lines.py says what is a comment."""
    try:
        text = lines.read(path)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}); give data.quarantine an existing file"
        ) from None
    except ValueError as e:
        raise UserError(f"{path}: cannot be read as a list of names ({e})") from None
    reasons = {}
    for line in text:
        if not lines.is_comment(line):
            name, _, reason = line.partition("\t")
            reasons[lines.unescaped(name)] = reason
    return reasons


def _numbered(one: Listing) -> bool:
    return all(name.isdecimal() for name in one.classes)


def _is_copy(one: Listing, other: Listing) -> bool:
    """Whether the two have the same names, labels and, at eight places, bytes."""
    if one.fingerprint != other.fingerprint:
        return False
    some = set(np.linspace(0, len(one.files) - 1, 8).astype(int).tolist())
    try:
        return all(one.read(i) == other.read(i) for i in some)
    except OSError:
        # A missing or broken image is another check's matter.
        return False


def _is_in(train: Listing, val: Listing, i: int) -> bool:
    """Whether an image of `val` is, byte for byte, a training image of its class; of a class with very
    many images that is not looked for."""
    own = train.kept[train.labels[train.kept] == val.labels[i]]
    if len(own) > SEARCHED:
        return False
    try:
        content = val.read(i)
        alike = (j for j in own.tolist() if _size(train, j) == len(content))
        return any(train.read(j) == content for j in alike)
    except OSError:
        # As above.
        return False


def _size(one: Listing, i: int) -> int:
    """Bytes.  Raises OSError."""
    return int(one.places.size[i]) if one.places else os.stat(one.root / one.files[i]).st_size


def _same_files(one: Listing, other: Listing) -> int:
    """How many images of the other are files of the one."""
    here, there = (Path(os.path.realpath(x.root)) for x in (one, other))
    if not (here.is_relative_to(there) or there.is_relative_to(here)):
        return 0
    mine = {f"{here}/{one.files[i]}" for i in one.kept.tolist()}
    return sum(f"{there}/{other.files[i]}" in mine for i in other.kept.tolist())


def _refuse_bytes(found: Listing) -> None:
    """Raises UserError where the name of the source or of a tar is not UTF-8, which DALI and the
    terminal need.  Names of images may be any bytes."""
    for name in [str(found.source), *(found.places.tars if found.places else [])]:
        if not lines.is_utf8(name):
            raise UserError(f"{name}: its name is not UTF-8, which NVIDIA DALI needs; rename it")


def _folder(source: Path) -> Listing:
    """Tars, where there are any or a manifest of them, else class folders."""
    # Not those that begin with a dot: macOS puts a ._x.tar beside x.tar.
    tars = sorted(glob.glob("*.tar", root_dir=source))
    others = (p for p in source.iterdir() if p.name.lower() not in folder.SYSTEM)
    if tars and any(p.is_dir() for p in others if not p.name.startswith(".")):
        raise UserError(
            f"{source}: holds tars and also folders; to read the tars give {source}/*.tar, else "
            "move them out"
        )
    # A manifest without tars: `shards.load` says what is missing.
    packed = tars or (source / shards.BEGUN).exists() or _has_manifest(source)
    return shards.load(source, source, tars) if packed else folder.class_folders(source)


def _remote(source: Url, quarantine: Path | str | None, images: config.Data | None) -> Listing:
    """The tars of a folder in object storage, or some of them."""
    alone = source.suffix == ".tar"
    name = str(quarantine) if quarantine is not None else None
    store = Store(source.parent if alone else source, images, name)
    tars = _expand(source, _Names(store.tars)) if alone else store.tars
    try:
        found = shards.load(source, store.root, tars, store)
    except UserError as e:
        raise store.named(e) from None
    store.say_cached(tars)
    return found


def _has_manifest(source: Path) -> bool:
    """Whether the folder has a manifest of `fastdisco data pack`; other tools write files of that
    name, too."""
    try:
        return shards.manifest_of(source, None) is not None
    except UserError:
        return False


def _left_out(found: Listing, path: Path, absolute: bool) -> np.ndarray:
    """Indices of the images that the quarantine names, ascending."""
    if not absolute and not path.exists():
        return found.left_out
    names = list(read_quarantine(path))
    if absolute:
        # One file may serve several data sets: only names in this one's root count.
        inside = f"{found.home}/"
        names = [n.removeprefix(inside) for n in names if n.startswith(inside)]
    here = [n for n in names if n in found.number]
    if strange := [lines.printable(n) for n in names if n not in found.number]:
        say(f"{path}: passed over, since not in {found.source}: {shorten(strange)}")
    if len(here) == len(found.files):
        raise UserError(f"{path}: names every image of {found.source}; nothing is left to read")
    return np.sort(np.array([found.number[n] for n in here], np.int64))


class _Folder:
    """A folder's files by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def matching(self, pattern: str) -> list[str]:
        if WILD.search(pattern):
            return sorted(glob.glob(pattern, root_dir=self._folder))
        return [pattern] if (self._folder / pattern).is_file() else []


class _Names:
    """Names as a folder has them."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def matching(self, pattern: str) -> list[str]:
        if WILD.search(pattern):
            return sorted(fnmatch.filter(self._names, pattern))
        return [pattern] if pattern in self._names else []


def _expand(pattern: Path, folder: _Folder | _Names) -> list[str]:
    """Names of the tars that a pattern means in its folder; only its last part is a pattern, the
    folder is taken literally."""
    whole = [pattern.name]
    # {000..099} by hand, once for each pair of braces; the shell's wildcards by glob.
    while m := re.search(r"\{(\d+)\.\.(\d+)\}", whole[0]):
        numbers = [f"{i:0{len(m[1])}}" for i in range(int(m[1]), int(m[2]) + 1)]
        whole = [name.replace(m[0], n, 1) for name in whole for n in numbers]
        if not whole:
            raise UserError(f"{pattern}: {m[0]} counts down; write the smaller number first")
    names = []
    for name in whole:
        hits = folder.matching(name)
        if not hits:
            raise UserError(f"{pattern.parent / name}: no such tar; {REMEDY}")
        names += hits
    return names
