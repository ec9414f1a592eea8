"""The index of a tar of samples (WebDataset): which image, class and bytes each sample is.

A sample is an image, its class as a number in `cls`, and in our own tars its stable index in `idx`
(tar_samples.py).

The index of x.tar is x.index beside it.  `fastdisco data pack` writes it, or the first use of a
foreign tar.  Its first line is JSON about the tar (`header`) with a checksum over the whole index.
Then each sample has a line, with tabs between index, label (-1: none), offset and size of the image
in bytes, and the name of the image's member.

Version 1 had neither checksum nor headers nor time.  Of a packed tar it is read as it is.  Of a
foreign tar it cannot be told from the index of an older tar, so it is written anew."""

import hashlib
import json
import stat
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdisco.common.errors import UserError
from fastdisco.common.files import open_regular, read_regular, write_whole
from fastdisco.common.heart import beat
from fastdisco.data.tar_samples import Member, Sample, samples

VERSION = "fastdisco index"  # the key in an index's first line
PROBES = 8  # headers that are compared at each start
OLD = {VERSION, "bytes", "sha256"}  # keys of version 1


class Row(NamedTuple):
    """A sample, as a line of an index has it."""

    index: int  # in a foreign tar the position there
    label: int  # -1: none
    offset: int  # of the image's first byte in the tar
    size: int  # of the image, bytes
    name: str  # of the image's member

    def line(self) -> str:
        """The line, without its end."""
        return "\t".join(map(str, self))

    @classmethod
    def parse(cls, line: str) -> "Row":
        """Raises ValueError for anything else than such a line."""
        index, label, offset, size, name = line.split("\t", 4)
        return cls(int(index), int(label), int(offset), int(size), name)


class Index(NamedTuple):
    """The content of an index file."""

    about: dict[str, Any]  # see `header`
    lines: list[str]  # of the samples

    @property
    def packed(self) -> bool:
        """Whether `fastdisco data pack` wrote it with its tar."""
        return self.about.get("sha256") is not None

    @property
    def old(self) -> bool:
        """Whether it is of version 1."""
        return self.about[VERSION] == 1


# ---- index files


def path_of(tar: Path) -> Path:
    """Where the tar's index lies."""
    return tar.with_suffix(".index")


def header(tar: Path, rows: list[Row], sha256: str | None) -> dict[str, Any]:
    """What an index says of its tar: size, time of its last change in ns, a digest of some headers.

    sha256: of the tar, known only of those that were packed here.  Their index has no time, since
    the same pack gives the same bytes."""
    about = tar.stat()
    return {
        VERSION: 2,
        "bytes": about.st_size,
        "sha256": sha256,
        "mtime_ns": None if sha256 else about.st_mtime_ns,
        "headers": headers(tar, [row.line() for row in rows]),
    }


def headers(tar: Path, lines: list[str]) -> str:
    """A digest of the headers of PROBES images, spread over the tar.  Images are left out of it: a
    damaged one is no other tar.  Raises OSError and ValueError."""
    spread = np.linspace(0, len(lines) - 1, PROBES).round().astype(int) if lines else []
    h = hashlib.sha256()
    with tar.open("rb") as f:
        for i in dict.fromkeys(spread):
            f.seek(Row.parse(lines[i]).offset - tarfile.BLOCKSIZE)
            h.update(f.read(tarfile.BLOCKSIZE))
    return h.hexdigest()


def index_text(about: dict[str, Any], rows: list[Row]) -> str:
    """The content of an index file."""
    lines = [row.line() for row in rows]
    first = json.dumps(about | {"checksum": _checksum(about, lines)})
    return "\n".join([first, *lines]) + "\n"


def parse(text: str) -> Index:
    """The content of an index file.  Raises ValueError for anything else, and where the checksum
    does not fit."""
    # Not splitlines, which also splits at characters that names may hold.
    first, *lines = text.removesuffix("\n").split("\n")
    about = json.loads(first)
    if not isinstance(about, dict) or VERSION not in about:
        raise ValueError("no index")
    checksum = about.pop("checksum", None)
    if about[VERSION] == 1:
        if checksum or about.keys() != OLD:
            raise ValueError("no index of version 1")
    elif checksum != _checksum(about, lines):
        raise ValueError("the checksum does not fit")
    return Index(about, lines)


def _checksum(about: dict[str, Any], lines: list[str]) -> str:
    text = "\n".join([json.dumps(about), *lines])
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def about(tar: Path) -> dict[str, Any]:
    """The header in a tar's index file.  Raises OSError and ValueError."""
    with open_regular(path_of(tar)) as f:
        return json.loads(f.readline())


def rows_of(tar: Path) -> list[Row]:
    """The rows in a tar's index file.  Raises OSError and ValueError."""
    return [Row.parse(line) for line in parse(_read(path_of(tar))).lines]


def _read(path: Path) -> str:
    return read_regular(path).decode(errors="surrogateescape")


def read(tar: Path) -> Index | None:
    """A tar's index, None where there is none.  Raises UserError."""
    path = path_of(tar)
    try:
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise damaged(tar)
        return parse(_read(path))
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); allow reading it") from None
    except (ValueError, RecursionError):
        raise damaged(tar) from None


def damaged(tar: Path) -> UserError:
    """For an index that nothing can be read from."""
    return UserError(
        f"{path_of(tar)}: is not an index that fastdisco wrote, or damaged; remove it, it is "
        "written anew"
    )


def unreadable(tar: Path, error: OSError) -> UserError:
    """For a tar that cannot be opened or read."""
    return UserError(
        f"{tar}: cannot be read ({error.strerror or error}); copy it again, or remove it"
    )


def fits(tar: Path, index: Index) -> bool:
    """Whether the index of a foreign tar is of the tar as it is now: same size, same time of its
    last change, same headers.  Reads PROBES blocks.

    A tar that was changed keeps these three only where someone sets its time back and leaves the
    headers; `data check` finds that, too.  A copied tar may get a new time; it is indexed again."""
    try:
        found, about = tar.stat(), index.about
        same = (found.st_size, found.st_mtime_ns) == (about["bytes"], about["mtime_ns"])
        return same and headers(tar, index.lines) == about["headers"]
    except (OSError, ValueError, KeyError):
        return False


def make(tar: Path, stored: bool) -> tuple[Index, bool]:
    """A tar's index from the tar itself, written beside it where the folder can be written; whether
    it could.

    stored: see `scan`.  Raises UserError."""
    # Before the scan: a tar that changes meanwhile is indexed again at the next start.
    try:
        before = tar.stat()
        if not stat.S_ISREG(before.st_mode):
            raise UserError(f"{tar}: is no regular file; put a tar there, or move it away")
        rows = scan(tar, stored)
        about = header(tar, rows, None) | {"mtime_ns": before.st_mtime_ns}
        text = index_text(about, rows)
    except OSError as e:
        raise unreadable(tar, e) from None
    try:
        write_whole(path_of(tar), text)
    except OSError:
        return parse(text), False
    return parse(text), True


# ---- reading a tar


def scan(tar: Path, stored: bool) -> list[Row]:
    """The rows of a tar's index, from the tar itself.

    stored: its samples carry a stable index (a member .idx), else the index is the position in the
    tar.
    Raises UserError for anything else than a tar of samples."""
    rows: list[Row] = []
    for sample in samples(tar):
        beat()
        rows.append(_row(tar, sample, stored, len(rows)))
    if not rows:
        raise UserError(f"{tar}: an empty tar, it has no image; remove it")
    return rows


def size_in(head: bytes) -> int | None:
    """The size that a member's header gives, None for anything else than a header."""
    try:
        return tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape").size
    except tarfile.TarError:
        return None


def _row(tar: Path, sample: Sample, stored: bool, position: int) -> Row:
    image = sample.image
    label = _number(tar, sample.cls) if sample.cls else -1
    if not stored:
        return Row(position, label, image.offset, image.size, image.name)
    if sample.idx is None:
        raise UserError(
            f"{tar}: its sample {sample.stem}.* has no index (a member .idx), so manifest.json "
            "there is not of this tar; pack the data again"
        )
    return Row(_number(tar, sample.idx), label, image.offset, image.size, image.name)


def _number(tar: Path, member: Member) -> int:
    content = member.content or b""
    if not content.isdigit() or len(content) > 12:
        raise UserError(
            f"{tar}: its member {member.name} holds {content[:20]!r} instead of a whole number; is "
            "this a WebDataset tar?"
        )
    return int(content)
