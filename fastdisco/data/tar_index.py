"""The index of a tar of samples (WebDataset): which image, class and bytes each sample is.

A sample is the members of one stem that follow each other: an image, its class as a number in
`cls`, and in our own tars its stable index in `idx`.

The index of x.tar is x.index beside it.  `fastdisco data pack` writes it, or the first use of a
foreign tar.  Its first line is JSON about the tar (`header`).  Then each sample has a line, with
tabs between index, label (-1: none), offset and size of the image in bytes, and the name of the
image's member."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.data.folder import EXTENSIONS

# The first bytes of gzip, bzip2, xz and zstd files.
COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")


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


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    size: int
    content: bytes | None  # of a short class or index, without white space around it


# ---- index files


def path_of(tar: Path) -> Path:
    """Where the tar's index lies."""
    return tar.with_suffix(".index")


def header(size: int, sha256: str | None) -> dict[str, Any]:
    """What an index says of its tar.  sha256 is known only of tars that were packed here."""
    return {"fastdisco index": 1, "bytes": size, "sha256": sha256}


def index_text(about: dict[str, Any], rows: list[Row]) -> str:
    """The content of an index file."""
    return "\n".join([json.dumps(about), *(row.line() for row in rows)]) + "\n"


def split_text(text: str) -> tuple[str, list[str]]:
    """The first line of an index file, and those of its samples."""
    # Not splitlines, which also splits at characters that names may hold.
    first, *lines = text.removesuffix("\n").split("\n")
    return first, lines


def about(tar: Path) -> dict[str, Any]:
    """The header in a tar's index file.  Raises OSError and ValueError."""
    with path_of(tar).open() as f:
        return json.loads(f.readline())


def rows_of(tar: Path) -> list[Row]:
    """The rows in a tar's index file.  Raises OSError and ValueError."""
    _, lines = split_text(path_of(tar).read_text(errors="surrogateescape"))
    return [Row.parse(line) for line in lines]


def read_or_make(tar: Path, stored: bool) -> tuple[str, bool]:
    """The text of a tar's index, and whether it is on disk.  A missing index is made and, where the
    folder can be written, stored.

    stored: see `scan`.  Raises UserError."""
    path = path_of(tar)
    try:
        return path.read_text(errors="surrogateescape"), True
    except FileNotFoundError:
        pass
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); allow reading it") from None
    text = index_text(header(tar.stat().st_size, None), scan(tar, stored))
    try:
        write_whole(path, text)
    except OSError:
        return text, False
    return text, True


# ---- reading a tar


def scan(tar: Path, stored: bool) -> list[Row]:
    """The rows of a tar's index, from the tar itself.

    stored: its samples carry a stable index (a member .idx), else the index is the position in the
    tar.
    Raises UserError for anything else than a tar of samples."""
    rows = []
    for stem, parts in _samples(tar):
        rows.append(_row(tar, stem, parts, stored, len(rows)))
    if not rows:
        raise UserError(f"{tar}: an empty tar; remove it")
    return rows


def size_in(head: bytes) -> int | None:
    """The size that a member's header gives, None for anything else than a header."""
    try:
        return tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape").size
    except tarfile.TarError:
        return None


def _samples(tar: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Stem of each sample, and its members by their extension in lower case."""
    stem, parts = None, {}
    for member in _members(tar):
        # The stem ends at the first dot of the last part, as in WebDataset.
        _, _, extension = member.name.rpartition("/")[2].partition(".")
        key = member.name[: len(member.name) - len(extension)]
        if key != stem:
            if stem is not None:
                yield stem, parts
            stem, parts = key, {}
        parts.setdefault(extension.lower(), member)
    if stem is not None:
        yield stem, parts


def _row(tar: Path, stem: str, parts: dict[str, Member], stored: bool, position: int) -> Row:
    images = [extension for extension in parts if extension in EXTENSIONS]
    if len(images) != 1:
        found = " and ".join(images) if images else "none"
        raise UserError(
            f"{tar}: its sample {stem}* needs one image, found {found} (members: "
            f"{shorten(list(parts))}; images are {' '.join(EXTENSIONS)}); is this a WebDataset tar?"
        )
    image = parts[images[0]]
    if "\n" in image.name or "\r" in image.name:
        raise UserError(f"{tar}: the member {image.name!r} has a line break in its name; rename it")
    label = _number(tar, parts["cls"]) if "cls" in parts else -1
    if stored and "idx" not in parts:
        raise UserError(
            f"{tar}: its sample {stem}* has no index (a member .idx), so manifest.json there is "
            "not of this tar; pack the data again"
        )
    index = _number(tar, parts["idx"]) if stored else position
    return Row(index, label, image.offset, image.size, image.name)


def _number(tar: Path, member: Member) -> int:
    content = member.content or b""
    if not content.isdigit() or len(content) > 12:
        raise UserError(
            f"{tar}: its member {member.name} holds {content[:20]!r} instead of a whole number; is "
            "this a WebDataset tar?"
        )
    return int(content)


def _members(tar: Path) -> Iterator[Member]:
    """The regular files in a tar, in order.  Raises UserError for a tar that is not whole."""
    again = "copy it again, or remove it"
    try:
        # "r:" refuses compressed tars, whose bytes DALI cannot address.
        with tarfile.open(tar, "r:") as t, tar.open("rb") as f:
            for m in t:
                if m.issparse():
                    raise UserError(
                        f"{tar}: its member {m.name} is sparse; write the tar without --sparse"
                    )
                if m.isreg():
                    yield Member(m.name, m.offset_data, m.size, _content(t, m))
            # tarfile takes any end for the end.  A whole tar has an empty block there.
            f.seek(t.offset)
            end = f.read(tarfile.BLOCKSIZE)
            if not end:
                raise tarfile.ReadError("no end mark")
            if end.strip(b"\0"):
                raise UserError(
                    f"{tar}: damaged, there is no member's header at byte {t.offset}; {again}"
                )
    except (tarfile.TarError, ValueError, EOFError) as e:
        if _is_compressed(tar):
            why, how = "compressed", "unpack it once, as DALI reads plain tars only"
        else:
            why, how = f"truncated or no tar ({e})", again
        raise UserError(f"{tar}: {why}; {how}") from None
    except OSError as e:
        raise UserError(f"{tar}: cannot be read ({e.strerror or e}); {again}") from None


def _content(t: tarfile.TarFile, m: tarfile.TarInfo) -> bytes | None:
    if not m.name.endswith((".cls", ".idx")) or m.size > 64:
        return None
    file = t.extractfile(m)
    return file.read().strip() if file else None


def _is_compressed(tar: Path) -> bool:
    with tar.open("rb") as f:
        return f.read(2) in COMPRESSED
