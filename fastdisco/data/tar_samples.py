"""The samples in a tar, as WebDataset reads them: members of one stem that follow each other.

The stem of a member ends at the first dot of its last part; what follows is the extension.  Each
thing that would make an image or a class vanish without a word is refused, with the remedy.  What
tools leave behind is passed over: names that begin with a dot (.DS_Store, ._x.jpg), names without
one (README), folders __MACOSX, and README.md or __info__.json beside the samples."""

import itertools
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.data.folder import EXTENSIONS
from fastdisco.data.lines import for_shell, quoted

# The first bytes of gzip, bzip2, xz and zstd files.
COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")
# Stems, in lower case, of files about a data set.
ABOUT = {"readme", "license", "licence", "copying", "notice", "authors", "thumbs", "desktop"}
# Last extensions of members that hold files themselves.
ARCHIVES = ("tar", "tgz", "tbz2", "txz", "zip")
# Type of a member that begins in the volume before (GNU).
CONTINUED = b"M"
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
REWRITE = "unpack it and write it again: tar --sort=name -cf NEW.tar -C FOLDER ."


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    size: int
    content: bytes | None  # of a short class or index, without white space around it


class Sample(NamedTuple):
    """An image and what belongs to it."""

    stem: str
    image: Member
    cls: Member | None
    idx: Member | None


def samples(tar: Path) -> Iterator[Sample]:
    """The samples in a tar, in order.

    Raises UserError for a tar that is not whole, and for members that are no samples or whose
    reading would leave one out."""
    kinds_of: dict[str, tuple[str, ...]] = {}
    # Equal tuples are one object, or a million samples would hold a million of them.
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}
    without_image = None
    for stem, members in itertools.groupby(_members(tar), _stem):
        parts = _parts(tar, members)
        if stem in kinds_of:
            raise _again(tar, kinds_of[stem], parts)
        kinds = tuple(parts)
        kinds_of[stem] = shared.setdefault(kinds, kinds)
        if image := _image(tar, stem, parts):
            yield Sample(stem, image, _class(tar, stem, parts), parts.get("idx"))
        elif without_image is None and not _is_about(stem):
            # Not refused at once: its image may come later, which is another fault.
            without_image = stem, parts
    if without_image:
        raise _no_image(tar, *without_image)


# ---- a sample


def _split(member: Member) -> tuple[str, str]:
    """Stem, without its dot, and extension in lower case."""
    folder, slash, name = member.name.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower()


def _stem(member: Member) -> str:
    return _split(member)[0]


def _last(extension: str) -> str:
    """The `jpg` of `input.jpg`."""
    return extension.rpartition(".")[2]


def _parts(tar: Path, members: Iterable[Member]) -> dict[str, Member]:
    """The members of a sample by their extensions."""
    parts: dict[str, Member] = {}
    for member in members:
        extension = _split(member)[1]
        if extension in parts:
            raise _twice(tar, parts[extension].name, member)
        parts[extension] = member
    return parts


def _image(tar: Path, stem: str, parts: dict[str, Member]) -> Member | None:
    """The image of a sample: 1.jpg, beside which 1.mask.png may lie, or else 1.input.jpg."""
    plain = [extension for extension in parts if extension in EXTENSIONS]
    images = plain or [extension for extension in parts if _last(extension) in EXTENSIONS]
    if len(images) > 1:
        dots = "; its name ends at the first dot" * (not plain)
        raise UserError(
            f"{tar}: its sample {stem}.* needs one image, found "
            f"{shorten([parts[x].name for x in images])}{dots}; rename or remove all but one, then "
            "write the tar again"
        )
    return parts[images[0]] if images else None


def _class(tar: Path, stem: str, parts: dict[str, Member]) -> Member | None:
    """1.cls, or else 1.input.cls."""
    classes = ["cls"] if "cls" in parts else [x for x in parts if _last(x) == "cls"]
    if len(classes) > 1:
        raise UserError(
            f"{tar}: its sample {stem}.* has several classes ({shorten(classes)}); name the right "
            "one .cls, then write the tar again"
        )
    return parts[classes[0]] if classes else None


def _is_about(stem: str) -> bool:
    """Whether members of that stem are about the data set, where none of them is an image."""
    name = stem.rpartition("/")[2].lower()
    return name in ABOUT or name.startswith("__")


def _twice(tar: Path, first: str, again: Member) -> UserError:
    """For two members that are one part of one sample."""
    where = f"at byte {again.offset}"
    both = f"{first} and {again.name}" if first != again.name else f"{first} twice"
    return UserError(
        f"{tar}: holds {both} (again {where}), as a tar does that was appended to, and one of them "
        f"would be lost; {REWRITE}"
    )


def _again(tar: Path, before: tuple[str, ...], parts: dict[str, Member]) -> UserError:
    """For members of a sample that follow those of others."""
    for extension, member in parts.items():
        if extension in before:
            return _twice(tar, member.name, member)
    member = next(iter(parts.values()))
    return UserError(
        f"{tar}: its member {member.name} does not follow the rest of its sample "
        f"(.{', .'.join(before)}; a sample's name ends at the first dot); {REWRITE}"
    )


def _no_image(tar: Path, stem: str, parts: dict[str, Member]) -> UserError:
    names = [m.name for m in parts.values()]
    if any(_last(extension) in ARCHIVES for extension in parts):
        return UserError(
            f"{tar}: its member {names[0]} is an archive itself; unpack both, the inner one into a "
            "folder of its name (its class), and give the folder of these folders"
        )
    return UserError(
        f"{tar}: its sample {stem}.* needs one image, found none (members: {shorten(names)}; "
        f"images are {' '.join(EXTENSIONS)}); give it one, or take it out by "
        f"`tar --delete -f {for_shell(str(tar))} -- {' '.join(map(quoted, names[:4]))}`"
    )


# ---- members


def _members(tar: Path) -> Iterator[Member]:
    """The regular files in a tar, in order, but those that are passed over.  Raises UserError for a
    tar that is not whole."""
    again = "copy it again, or remove it"
    try:
        # "r:" refuses compressed tars, whose bytes DALI cannot address.
        with tarfile.open(tar, "r:") as t, tar.open("rb") as f:
            for m in t:
                if _is_passed_over(m.name):
                    continue
                if CONTROL.search(m.name):
                    raise UserError(
                        f"{tar}: the member {m.name!r} has a line break or another control "
                        "character in its name; rename it"
                    )
                _refuse_without_bytes(tar, m)
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
            while block := f.read(1 << 20):
                if rest := block.lstrip(b"\0"):
                    raise UserError(
                        f"{tar}: more follows its end mark, at byte {f.tell() - len(rest)}, and "
                        "would not be read; copy it again, or if it was joined of several tars, "
                        "unpack it by `tar -xif` and write it again"
                    )
    except (tarfile.TarError, ValueError, EOFError) as e:
        if _is_compressed(tar):
            why, how = "compressed", "unpack it once, as DALI reads plain tars only"
        else:
            why, how = f"truncated or no tar ({e})", again
        raise UserError(f"{tar}: {why}; {how}") from None
    except OSError as e:
        raise UserError(f"{tar}: cannot be read ({e.strerror or e}); {again}") from None


def _is_passed_over(name: str) -> bool:
    *folders, last = name.split("/")
    return last.startswith(".") or "." not in last or "__MACOSX" in folders


def _refuse_without_bytes(tar: Path, m: tarfile.TarInfo) -> None:
    """Raises UserError for a member whose bytes are elsewhere or in pieces."""
    if m.issparse():
        raise UserError(f"{tar}: its member {m.name} is sparse; write the tar without --sparse")
    if m.type == CONTINUED:
        raise UserError(
            f"{tar}: its member {m.name} began in another volume; join the volumes by unpacking "
            "them together, then write one tar"
        )
    last = m.name.rpartition(".")[2].lower()
    if (m.issym() or m.islnk()) and last in (*EXTENSIONS, "cls", "idx"):
        raise UserError(
            f"{tar}: its member {m.name} is a link to {m.linkname!r} and has no bytes of its own; "
            "write the tar with --dereference --hard-dereference"
        )


def _content(t: tarfile.TarFile, m: tarfile.TarInfo) -> bytes | None:
    if not m.name.lower().endswith((".cls", ".idx")) or m.size > 64:
        return None
    file = t.extractfile(m)
    return file.read().strip() if file else None


def _is_compressed(tar: Path) -> bool:
    with tar.open("rb") as f:
        return f.read(2) in COMPRESSED
