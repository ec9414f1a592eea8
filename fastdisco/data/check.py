"""Looks at every image of a data set before the training does: `fastdisco data check`."""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from rich.progress import track
from rich.table import Table

from fastdisco.common.console import console, say, shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.common.limits import MAX_PIXELS
from fastdisco.data import lines, shards, tar_index
from fastdisco.data.decoder import Decoder
from fastdisco.data.folder import Listing, told
from fastdisco.data.pack import QUARANTINE, ahead
from fastdisco.data.source import listing, read_quarantine, same_classes

BATCH, PIXELS = 64, 50_000_000  # images and pixels that are decoded at a time, at most
# What DALI reads, by Pillow's names.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM")
# The mark among the last bytes of a whole file; MPO is a JPEG with more pictures behind it.
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
TAIL = 4096  # last bytes in which the mark is searched
STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n": "PNG",
    b"RIFF": "WEBP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
    **{b"P%d" % kind: "PPM" for kind in range(1, 7)},
}
PNG_LIMITS = ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY")
SHOWN = 20  # faults printed one by one


class Fault(NamedTuple):
    """An image that a training cannot or should not read."""

    index: int
    name: str
    kind: str  # empty, truncated, damaged, not an image, too large, unreadable
    detail: str


class Encoded(NamedTuple):
    """An image that the decoder is to judge."""

    index: int
    content: bytes
    pixels: int
    # Kind and detail of what looks wrong without decoding; None: nothing does.  Only the decoder
    # knows whether it concerns the picture.
    doubt: tuple[str, str] | None


class _Bad(Exception):
    """Kind and detail of a fault."""


def check(
    sources: list[Path],
    fast: bool = False,
    out: Path | None = None,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
    only: list[str] | None = None,
    devices: tuple[torch.device, ...] = (torch.device("cpu"),),
) -> list[Fault]:
    """Finds images that a training cannot or should not read.  Writes check.json and quarantine.txt
    into each data set's folder, or into `out`.  Returns the faults.

    fast     looks at headers and ends, and decodes only what looks wrong there.  Otherwise every
             image is decoded on each of the devices, and tars are compared with their index and
             SHA-256
    threads  None: all cores
    only     names of the images to look at; None: all
    The faults of a whole, slow check replace the quarantine of that data.  Those of a fast or
    partial check are added to it.
    Raises UserError for tars that do not fit their index, and for a source whose classes are not
    those of the first."""
    found = [listing(s) for s in sources]
    if out is None and any(one.remote for one in found):
        raise UserError(f"{found[0].source}: object storage takes no reports; give --out FOLDER")
    for other in found[1:]:
        same_classes(found[0], other)
    threads = threads or len(os.sched_getaffinity(0))
    whole, faults = not (fast or only), []
    for one in found:
        indices = shards.reading_order(one, _named(one, only))
        wrong = _wrong_tars(one, one.places.tars) if one.places and whole else []
        bad = _faults(one, indices, fast, threads, max_pixels, devices)
        path = _write(one, bad, len(indices), fast, whole, out)
        _report(one, bad, len(indices), path, out)
        if wrong:
            error = UserError("; ".join(wrong))
            raise one.remote.named(error) if one.remote else error
        faults += bad
    return faults


def _named(one: Listing, only: list[str] | None) -> np.ndarray:
    """Indices of the images of these names, ascending; of all for None."""
    if only is None:
        return np.arange(len(one.files))
    # `./` is how a name that begins with a dash is given.
    only = [n if n in one.number else n.removeprefix("./") for n in only]
    if strange := [n for n in only if n not in one.number]:
        raise UserError(
            f"{one.source}: has no image {shorten(strange)}; give names as they stand in the "
            f"listing, for example {one.files[0]}"
        )
    return np.unique([one.number[n] for n in only])


# ---- images


def _faults(
    one: Listing,
    indices: np.ndarray,
    fast: bool,
    threads: int,
    max_pixels: int,
    devices: tuple[torch.device, ...],
) -> list[Fault]:
    """The faults among these images, by index.  Threads read the files and look at the headers; the
    decoders take what is left, in batches."""
    found: dict[int, Fault] = {}
    decoders: list[Decoder] = []

    def left() -> Iterator[Encoded]:
        looks = ahead(pool, lambda i: _look(one, i, fast, max_pixels), indices.tolist())
        for look in track(looks, f"checking {one.source}", len(indices), transient=True):
            if isinstance(look, Fault):
                found[look.index] = look
            elif look is not None:
                yield look

    with _pillow(), ThreadPoolExecutor(threads) as pool:
        for batch in _batches(left()):
            # A fast check of good images needs none.
            decoders = decoders or [Decoder(device, BATCH, threads) for device in devices]
            for decoder in decoders:
                for fault in _refused(one, decoder, batch):
                    # The first device's words count.
                    found.setdefault(fault.index, fault)
    return [found[i] for i in sorted(found)]


def _refused(one: Listing, decoder: Decoder, batch: list[Encoded]) -> Iterator[Fault]:
    """Faults that show in decoding."""
    faults = decoder.faults([image.content for image in batch], complaints=True)
    for position, words in faults.items():
        image = batch[position]
        kind, detail = image.doubt or ("damaged", words)
        yield Fault(image.index, one.files[image.index], kind, detail)


def _batches(images: Iterable[Encoded]) -> Iterator[list[Encoded]]:
    """Batches of at most BATCH images and, where an image alone has no more, PIXELS pixels."""
    batch, pixels = [], 0
    for image in images:
        if batch and (len(batch) == BATCH or pixels + image.pixels > PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(image)
        pixels += image.pixels
    if batch:
        yield batch


def _look(one: Listing, index: int, fast: bool, max_pixels: int) -> Fault | Encoded | None:
    """What can be said of an image without decoding it.  fast: None where nothing looks wrong, and
    only then not all of it is read."""
    try:
        with one.open(index) as file:
            content = b"" if fast else file.read()
            pixels, doubt = _header(file if fast else io.BytesIO(content), max_pixels)
            if fast and doubt is None:
                return None
            if fast:
                file.seek(0)
                content = file.read()
        return Encoded(index, content, pixels, doubt)
    except _Bad as bad:
        return Fault(index, one.files[index], *bad.args)
    except OSError as e:
        return Fault(index, one.files[index], "unreadable", f"{e.strerror or e}; replace it")


def _header(file: BinaryIO, max_pixels: int) -> tuple[int, tuple[str, str] | None]:
    """Pixels of an image, and kind and detail of what looks wrong: some decoders forgive a missing
    end, and read behind headers that Pillow refuses.  Raises _Bad and OSError."""
    size = file.seek(0, io.SEEK_END)
    if not size:
        raise _Bad("empty", "has no bytes")
    file.seek(max(0, size - TAIL))
    tail = file.read()
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    try:
        with Image.open(file, formats=FORMATS) as image:
            kind, (width, height) = image.format or "", image.size
    # Pillow's readers raise anything on foreign bytes.
    except Exception:
        # How many pixels it has is not known: it is decoded alone.
        return PIXELS, _foreign(head, tail, size)
    if width * height > max_pixels:
        raise _Bad(
            "too large",
            f"{width} x {height} pixels, more than {max_pixels}; shrink it or raise --max-pixels",
        )
    cut = _cut(kind, head, tail, size)
    return width * height, ("truncated", cut) if cut else None


def _foreign(head: bytes, tail: bytes, size: int) -> tuple[str, str]:
    """Kind and detail of what looks wrong where Pillow cannot read the header.  Raises _Bad for
    what no decoder knows."""
    kind = next((k for start, k in STARTS.items() if head.startswith(start)), None)
    if kind is None:
        detail = f"begins with {head[:8]!r}, no format that DALI reads; convert or remove it"
        raise _Bad("not an image", detail)
    if cut := _cut(kind, head, tail, size):
        return "truncated", cut
    return "damaged", f"a {kind} whose header cannot be read"


def _cut(kind: str, head: bytes, tail: bytes, size: int) -> str:
    """What is missing at the end, empty where nothing is."""
    if kind in ENDS and ENDS[kind] not in tail:
        return f"a {kind} of {size} bytes without its end mark"
    # A RIFF file says its size, less the 8 bytes up to there.
    if kind == "WEBP" and size < (wanted := int.from_bytes(head[4:8], "little") + 8):
        return f"a WEBP of {wanted} bytes, of which {size} are there"
    return ""


@contextlib.contextmanager
def _pillow() -> Iterator[None]:
    """Pillow ready for threads, silent, and without limits: of pixels we have one of our own with a
    sentence for it, and no length of a text or a colour profile makes a picture bad."""
    Image.init()  # loads all readers, which Pillow otherwise does one by one
    limits = ((Image, "MAX_IMAGE_PIXELS", None), *((PngImagePlugin, x, 2**40) for x in PNG_LIMITS))
    before = [getattr(module, name) for module, name, _ in limits]
    log = logging.getLogger("PIL")
    level = log.level
    try:
        for module, name, value in limits:
            setattr(module, name, value)
        # They are about EXIF and other metadata, and would tear the progress bar.
        log.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        log.setLevel(level)
        for (module, name, _), value in zip(limits, before):
            setattr(module, name, value)


# ---- tars


def _wrong_tars(one: Listing, tars: list[str]) -> list[str]:
    """A sentence for each tar that is not what its index says."""
    packed = shards.manifest_of(one.root, None) is not None
    wrong = []
    for name in track(tars, f"comparing the tars of {one.source}", transient=True):
        with one.remote.hold([name]) if one.remote else contextlib.nullcontext():
            why = _wrong_tar(one.root / name, packed)
        if why:
            wrong.append(why)
    return wrong


def _wrong_tar(tar: Path, packed: bool) -> str:
    """What is wrong with a tar, empty where nothing is."""
    index = tar_index.path_of(tar)
    # In a folder that cannot be written there is none.
    about = tar_index.about(tar) if index.exists() else {}
    try:
        if about and tar_index.scan(tar, packed) != tar_index.rows_of(tar):
            return (
                f"{tar}: its index does not fit; copy both again, or remove {index} if the tar is "
                "right"
            )
        if about.get("sha256") and about["sha256"] != _sha256(tar):
            return f"{tar}: its bytes are not those that were packed (SHA-256); copy it again"
    except UserError as e:
        return str(e)
    return ""


def _sha256(path: Path) -> str:
    h = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


# ---- the report


def _write(
    one: Listing, bad: list[Fault], seen: int, fast: bool, whole: bool, out: Path | None
) -> Path:
    """Writes the report and the quarantine, and returns the quarantine's path.  In `out` the
    quarantine has absolute names, since it may hold those of several data sets."""
    if out is None:
        folder, prefix, name = one.root, "", "check.json"
    else:
        folder, prefix = Path(out), f"{one.home}/"
        name = "check-" + re.sub(r"[^\w.-]+", "_", one.source.name) + ".json"
    path = folder / QUARANTINE
    names = read_quarantine(path) if path.exists() else {}
    if whole:
        # What was known of this data is replaced; names of other data stay.
        names = {n: reason for n, reason in names.items() if _elsewhere(one, prefix, n)}
    names |= {prefix + f.name: f"{f.kind}: {f.detail}" for f in bad}
    if broken := [n for n in names if set(n) & set("\t\n\r")]:
        raise UserError(
            f"{one.root}: the name {broken[0]!r} has a tab or line break; rename the file"
        )
    named = [f"{lines.escaped(n)}\t{reason}\n" for n, reason in sorted(names.items())]
    report = dict(
        source=str(one.source),
        images=len(one.files),
        looked_at=seen,
        fast=fast,
        passed_over=dict(one.passed_over),
        fingerprint=one.fingerprint,
        kinds=Counter(f.kind for f in bad),
        faults=[f._asdict() for f in bad],
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, json.dumps(report, indent=1) + "\n")
        if names or path.exists():
            write_whole(path, "".join(named))
    except OSError as e:
        raise UserError(
            f"{folder}: cannot be written ({e.strerror}); give --out FOLDER and set "
            f"data.quarantine=FOLDER/{QUARANTINE}"
        ) from None
    return path


def _elsewhere(one: Listing, prefix: str, name: str) -> bool:
    """Whether a name in the quarantine is of other data, of another list in the same folder for
    example, rather than of this one's images or of files that are gone."""
    if not name.startswith(prefix):
        return True
    inside = name.removeprefix(prefix)
    return inside not in one.number and (one.root / inside).exists()


def _report(one: Listing, bad: list[Fault], seen: int, path: Path, out: Path | None) -> None:
    """Prints what is passed over, a table of the kinds of faults, and the first faults."""
    if one.passed_over:
        say(f"{one.source}: passed over: {lines.printable(told(one.passed_over))}")
    if not bad:
        say(f"{one.source}: {seen} images, all good")
        return
    table = Table("fault", "images", "the first")
    for kind, n in Counter(f.kind for f in bad).most_common():
        first = next(f.name for f in bad if f.kind == kind)
        table.add_row(kind, str(n), lines.printable(first))
    console.print(table)
    for f in bad[:SHOWN]:
        say(lines.printable(f"{f.name}: {f.kind}: {f.detail}"))
    if len(bad) > SHOWN:
        say(f"and {len(bad) - SHOWN} more, see {path}")
    use = "a training leaves them out"
    if out is not None:
        use = f"with data.quarantine={path.resolve()} {use}"
    say(f"{one.source}: {len(bad)} of {seen} images are bad; {path} names them, {use}")
