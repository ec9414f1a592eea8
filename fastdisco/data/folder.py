"""The images of a data set in their fixed order, and where each one's bytes are: class folders and
list files.  Tars are in shards.py.

N is the number of images."""

import contextlib
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import open_regular
from fastdisco.common.heart import beat
from fastdisco.data import lines
from fastdisco.data.cache import Remote

# What DALI decodes.
EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jif", "jfif"),
    *("png", "bmp", "tif", "tiff", "webp"),
    *("jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
    *("pnm", "ppm", "pgm", "pbm"),
)
# Folders that systems and devices put beside files, in lower case.  They hold thumbnails, resource
# forks and deleted files, not the data set's images.
SYSTEM = (
    *("@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot"),
    *("__macosx", "__pycache__", "lost+found", "$recycle.bin", "system volume information"),
)
# Names of folders that part a data set.
PART = re.compile(
    r"(train(ing|val)?|val(id|idation)?|test(ing)?)([-_ ]?(set|data|images?|\d{4}))?", re.IGNORECASE
)
BESIDE = "images beside the class folders"
UNLABELLED = "unlabelled"  # the class of images without one
# Of a list with names like n01440764_10026.JPEG, those of SimCLR's subsets of ImageNet.
SIMCLR = r"sed -E 's,^(n[0-9]+)_.*,\1/& \1,' {} > NEW.txt"


class Places(NamedTuple):
    """Where the bytes of images in tars are."""

    tars: list[str]  # relative to the listing's root
    tar: np.ndarray  # [N] int64, which of them
    offset: np.ndarray  # [N] int64, of the image's first byte
    size: np.ndarray  # [N] int64, bytes


# A base of its own, since a NamedTuple has no place for the cached properties of Listing.
class _Listing(NamedTuple):
    source: Path  # what was asked for: the root, or a list file or tars in it
    root: Path
    # Relative to root, `/` between the parts.  An image in a tar is the tar, then its member.
    files: list[str]
    labels: np.ndarray  # [N] int64
    classes: list[str]
    places: Places | None = None  # for images in tars
    left_out: np.ndarray = np.zeros(0, np.int64)  # indices that the quarantine names
    # How many files are not taken, by their extension (`.gif`) or their folder (`@eaDir/`).
    passed_over: tuple[tuple[str, int], ...] = ()
    remote: Remote | None = None  # for tars in object storage


class Listing(_Listing):
    """Images in their fixed order.  An image's position here is its index everywhere, whatever the
    quarantine leaves out."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, labels and places in tars, not over the root: a moved folder is the
        same data."""
        text = "\0".join(self.files) + "\0" + " ".join(map(str, self.labels.tolist()))
        # File names are bytes, not always UTF-8.
        h = hashlib.sha256(text.encode(errors="surrogateescape"))
        if self.places:
            h.update(self.places.offset.tobytes())
        return h.hexdigest()

    @cached_property
    def sampled(self) -> str:
        """SHA-256 over the bytes of eight of the images to use: sets with the same names, such as one
        validation set in several corruptions, have one fingerprint.  Raises OSError."""
        h = hashlib.sha256()
        places = np.linspace(0, len(self.kept) - 1, min(8, len(self.kept))).astype(int)
        for i in self.kept[places].tolist():
            h.update(hashlib.sha256(self.read(i)).digest())
        return h.hexdigest()

    @cached_property
    def kept(self) -> np.ndarray:
        """Indices of the images to use, ascending."""
        return np.setdiff1d(np.arange(len(self.files)), self.left_out)

    @cached_property
    def number(self) -> dict[str, int]:
        """The index of an image by its name."""
        return {name: i for i, name in enumerate(self.files)}

    @property
    def shown(self) -> Path:
        """The root in messages: of object storage the address."""
        return self.remote.url if self.remote else self.root

    @property
    def home(self) -> str:
        """What absolute names of its images begin with: the root as an absolute path, or the address
        in object storage."""
        return str(self.remote.url) if self.remote else str(self.root.resolve())

    def open(self, index: int) -> BinaryIO:
        """An image's bytes as a file.  Raises OSError, and UserError where object storage refuses
        them."""
        if self.places is None:
            return open_regular(self.root / self.files[index])
        p = self.places
        name, where = p.tars[p.tar[index]], (int(p.offset[index]), int(p.size[index]))
        # An open file stays whole when its tar leaves the cache.
        with self.remote.hold([name]) if self.remote else contextlib.nullcontext():
            return io.BufferedReader(_Slice(self.root / name, *where))

    def read(self, index: int) -> bytes:
        """An image's bytes.  Raises OSError."""
        with self.open(index) as f:
            return f.read()


class _Slice(io.RawIOBase):
    """`size` bytes of a file from `offset` on, as a file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        # It stays open until close().
        self._file = open_regular(path)
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + to)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        want = min(len(view), max(0, self._size - self._at))
        if not want:
            return 0
        found = os.preadv(self._file.fileno(), [view[:want]], self._offset + self._at)
        if not found:
            raise OSError(f"ends {self._size - self._at} bytes before the image does")
        self._at += found
        return found

    def close(self) -> None:
        self._file.close()
        super().close()


def class_folders(root: Path) -> Listing:
    """The images of root/<class>/**, with classes and the files of a class sorted by name, which
    gives torchvision's labels.

    Passed over are names that begin with a dot, folders of the system (SYSTEM), images beside the
    class folders and files without an image's extension; `passed_over` counts all but the first.
    Links to files are followed.  Links to folders are refused, since they can lead out of the root
    or round in a circle.
    Raises UserError naming the path and the remedy."""
    loose: Counter[str] = Counter()
    classes, flat = _scan(root, loose)
    # Other files lie beside the class folders by good right, check.json for one.
    passed = Counter({name: n for name, n in loose.items() if name.endswith("/")})
    if flat:
        passed[BESIDE] = len(flat)
    if not classes:
        found = f"{len(flat)} images lie in it directly" if flat else "it is empty of images"
        raise UserError(
            f"{root}: no class folders, {found}; put the images into one folder per class, "
            f"{root}/<class>/<image>, or write a list file (docs/data.md, ImageNet's validation "
            "images)"
        )
    _refuse_parts(root, classes)
    files, labels, empty, instead = [], [], [], Counter()
    for label, name in enumerate(classes):
        others: Counter[str] = Counter()
        inside = _images(root, name, others)
        files += inside
        labels += [label] * len(inside)
        passed += others
        if not inside:
            empty.append(name)
            instead += others
    if empty:
        _refuse_empty(root, empty, not files, instead)
    counted = tuple(passed.most_common())
    return Listing(root, root, files, np.array(labels, np.int64), classes, passed_over=counted)


def flat(root: Path) -> Listing | None:
    """The images of a folder that has no others in it, sorted by name, without classes; None of any
    other folder.  What `class_folders` passes over is passed over here."""
    passed: Counter[str] = Counter()
    folders, files = _scan(root, passed)
    # Tars beside images are another kind of data.
    if folders or not files or ".tar" in passed:
        return None
    labels, counted = np.zeros(len(files), np.int64), tuple(passed.most_common())
    return Listing(root, root, files, labels, [UNLABELLED], passed_over=counted)


def _refuse_empty(root: Path, empty: list[str], everywhere: bool, instead: Counter[str]) -> None:
    """Raises UserError for class folders without an image, which hold other things instead."""
    known = " ".join(EXTENSIONS)
    there = f" but {told(instead.most_common())}" if instead else ""
    if everywhere:
        raise UserError(
            f"{root}: {len(empty)} class folders and not one image{there}; add files with one of "
            f"the extensions {known}"
        )
    raise UserError(
        f"{root}: no image in the class folder{'s' * (len(empty) > 1)} {shorten(empty)}{there}; "
        f"remove or fill (extensions: {known})"
    )


def told(passed_over: Iterable[tuple[str, int]]) -> str:
    """'12 .avif, 2 @eaDir/': what is not taken."""
    return shorten([f"{n} {name}" for name, n in passed_over])


def _refuse_parts(root: Path, classes: list[str]) -> None:
    """Raises UserError for the root of a data set, whose train and val would become classes, and
    for a folder that holds nothing but another one with the class folders."""
    parts = [name for name in classes if PART.fullmatch(name)]
    if len(parts) < 2:
        # `train` may also be the vehicle.
        lone = parts or (classes if len(classes) == 1 else [])
        parts = [name for name in lone if _holds_only_folders(root / name)]
    if parts:
        inner = next((name for name in parts if name.lower().startswith("train")), parts[0])
        many = len(parts) > 1
        raise UserError(
            f"{root}: its folder{'s' * many} {shorten(parts)} {'are' if many else 'is'} not "
            f"{'classes' if many else 'a class'} but {'parts' if many else 'a part'} of a data "
            f"set; give {root / inner}"
        )


def _holds_only_folders(folder: Path) -> bool:
    folders, files = _scan(folder, Counter())
    return bool(folders) and not files


def list_file(path: Path, bare: bool = False) -> Listing:
    """The images that a text file names, one `<path> <class>` a line, in the order of the file.
    lines.py says what is a comment.

    Paths are relative to the file's folder and stay in it.  Classes are names, or numbers from 0
    on.  bare: a file in which every line ends like an image lists images without classes.
    Raises UserError naming file and line."""
    root = path.parent
    files, names = _lines(path, bare)
    if not files:
        raise UserError(f"{path}: lists no image; write a line `<image> <class>` for each")
    name, count = Counter(files).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: lists {name} twice; remove one of the lines")
    inside = os.path.realpath(root)
    for folder in {os.path.dirname(name) for name in files}:
        if os.path.commonpath([inside, os.path.realpath(root / folder)]) != inside:
            raise UserError(
                f"{path}: {folder} is a link that leads out of {root}; list images of that folder "
                "only"
            )
    labels, classes = classes_of(names)
    return Listing(path, root, files, labels, classes)


def classes_of(names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels [N] and class names, from the class of each image.

    Names are sorted.  Where all are numbers, these are the labels themselves."""
    if all(n.isdecimal() and n.isascii() and len(n) < 7 for n in names):
        labels = np.array(names, np.int64)
        return labels, [str(i) for i in range(labels.max() + 1)]
    classes = sorted(set(names))
    label = {name: i for i, name in enumerate(classes)}
    return np.array([label[n] for n in names], np.int64), classes


def _lines(path: Path, bare: bool) -> tuple[list[str], list[str]]:
    """Path and class of each line of a list file."""
    try:
        text = lines.read(path)
    except (OSError, ValueError) as e:
        raise UserError(
            f"{path}: is a file and cannot be read as a list of images ({e}); give a folder, a text "
            "file with a line `<image> <class>` for each image, or tars"
        ) from None
    files, classes = [], []
    text = [line.strip() for line in text]
    bare = bare and all(_extension(x) in EXTENSIONS for x in text if not lines.is_comment(x))
    for number, line in enumerate(text, 1):
        if lines.is_comment(line):
            _refuse_lost(path, number, line)
            continue
        # Split from the right: a path may hold spaces, a class may not.
        name, *rest = (line, UNLABELLED) if bare else line.rsplit(maxsplit=1)
        # A name with spaces and without a class, or the class before the name.
        if not rest or _extension(rest[0]) in EXTENSIONS:
            raise UserError(
                f"{path}: line {number} is no `<image> <class>`: {line[:60]!r}; write both, names "
                f"of SimCLR's lists for example by `{SIMCLR.format(lines.for_shell(str(path)))}`, and "
                "put that file beside the class folders"
            )
        name = lines.unescaped(name)
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise UserError(
                f"{path}: line {number} leads out of {path.parent}: {name}; list images of that "
                "folder by relative paths without `..`"
            )
        files.append(name)
        classes += rest
    return files, classes


def _refuse_lost(path: Path, number: int, line: str) -> None:
    """Raises UserError for a comment that reads like an image which is there."""
    name = line.rsplit(maxsplit=1)[0] if line else ""
    if name and os.path.isfile(path.parent / name):
        raise UserError(
            f"{path}: line {number} begins with # and so is a comment, but {name} is a file; write "
            f"`{lines.escaped(line)}` for the image, or another comment"
        )


def _images(root: Path, folder: str, passed: Counter[str]) -> list[str]:
    """A folder's own images by name, then those of its folders.  `passed` counts what is passed
    over."""
    folders, files = _scan(root / folder, passed)
    out = [f"{folder}/{name}" for name in files]
    for name in folders:
        out += _images(root, f"{folder}/{name}", passed)
    return out


def _scan(folder: Path, passed: Counter[str]) -> tuple[list[str], list[str]]:
    """Names of sub-folders and of images, each sorted.  A directory entry knows its kind, so no
    file is looked at by itself.  `passed` counts what is passed over."""
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for e in entries:
                beat()
                if e.name.startswith("."):
                    continue
                if e.name.lower() in SYSTEM:
                    passed[f"{e.name}/"] += 1
                elif e.is_dir(follow_symlinks=False):
                    folders.append(e.name)
                elif e.is_symlink() and e.is_dir():
                    raise UserError(
                        f"{e.path}: a link to a folder is not followed; put the folder itself in "
                        "its place, or a folder of links to files"
                    )
                elif (extension := _extension(e.name)) in EXTENSIONS:
                    _refuse_special(e)
                    files.append(e.name)
                else:
                    passed[f".{extension}" if extension else "without extension"] += 1
    except OSError as err:
        raise UserError(f"{folder}: cannot be read ({err.strerror}); allow reading it") from None
    return sorted(folders), sorted(files)


def _refuse_special(e: os.DirEntry[str]) -> None:
    """Raises UserError for a pipe, a socket or a device in place of an image, also behind a link:
    reading it could wait for ever."""
    if e.is_file():
        return
    # A link to nothing stays in the list, the check names it.
    if not e.is_symlink() or os.path.exists(e.path):
        raise UserError(f"{e.path}: is a pipe, a socket or a device and no image; remove it")


def _extension(name: str) -> str:
    """In lower case, '' where there is none."""
    _, dot, extension = name.rpartition(".")
    return extension.lower() if dot else ""
