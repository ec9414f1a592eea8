"""Looks at every image of a data set before the training does: `fastdisco data check`."""

import contextlib
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from rich.table import Table

from fastdisco.common.console import console, say, shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.common.limits import MAX_PIXELS
from fastdisco.data import shards, tar_index
from fastdisco.data.decoder import Decoder
from fastdisco.data.folder import Listing
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
}
SHOWN = 20  # faults printed one by one


class Fault(NamedTuple):
    """An image that a training cannot or should not read."""

    index: int
    name: str
    kind: str  # empty, truncated, damaged, not an image, too large, unreadable
    detail: str


class Encoded(NamedTuple):
    """An image whose header is in order, not decoded yet."""

    index: int
    content: bytes
    pixels: int
    cut: str  # what is missing at its end, empty where nothing is


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

    fast     looks at headers and ends alone.  Otherwise every image is decoded on each of the
             devices, and tars are compared with their index and SHA-256
    threads  None: all cores
    only     names of the images to look at; None: all
    The faults of a whole, slow check replace the quarantine of that data.  Those of a fast or
    partial check are added to it.
    Raises UserError for tars that do not fit their index, and for a source whose classes are not
    those of the first."""
    found = [listing(s) for s in sources]
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
            raise UserError("; ".join(wrong))
        faults += bad
    return faults


def _named(one: Listing, only: list[str] | None) -> np.ndarray:
    """Indices of the images of these names, ascending; of all for None."""
    if only is None:
        return np.arange(len(one.files))
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
    decoders = [] if fast else [Decoder(device, BATCH, threads) for device in devices]

    def good() -> Iterator[Encoded]:
        looks = ahead(pool, lambda i: _look(one, i, fast, max_pixels), indices.tolist())
        for look in track(looks, f"checking {one.source}", len(indices), transient=True):
            if isinstance(look, Fault):
                found[look.index] = look
            else:
                yield look

    with _pillow(), ThreadPoolExecutor(threads) as pool:
        for batch in _batches(good()):
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
        kind = "truncated" if image.cut else "damaged"
        yield Fault(image.index, one.files[image.index], kind, image.cut or words)


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


def _look(one: Listing, index: int, fast: bool, max_pixels: int) -> Fault | Encoded:
    """What can be said of an image without decoding it; fast: without reading all of it."""
    try:
        with one.open(index) as file:
            content = b"" if fast else file.read()
            pixels, cut = _header(file if fast else io.BytesIO(content), max_pixels)
        # Some decoders forgive a missing end, so a slow check leaves it to them.
        if fast and cut:
            raise _Bad("truncated", cut)
        return Encoded(index, content, pixels, cut)
    except _Bad as bad:
        return Fault(index, one.files[index], *bad.args)
    except OSError as e:
        return Fault(index, one.files[index], "unreadable", f"{e.strerror or e}; replace it")


def _header(file: BinaryIO, max_pixels: int) -> tuple[int, str]:
    """Pixels of an image, and what is missing at its end.  Raises _Bad and OSError."""
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
        raise _Bad(*_foreign(head, tail, size)) from None
    if width * height > max_pixels:
        raise _Bad(
            "too large",
            f"{width} x {height} pixels, more than {max_pixels}; shrink it or raise --max-pixels",
        )
    return width * height, _cut(kind, head, tail, size)


def _foreign(head: bytes, tail: bytes, size: int) -> tuple[str, str]:
    """Kind and detail of the fault where Pillow cannot read the header."""
    kind = next((k for start, k in STARTS.items() if head.startswith(start)), None)
    if kind is None:
        detail = f"begins with {head[:8]!r}, no format that DALI reads; convert or remove it"
        return "not an image", detail
    if cut := _cut(kind, head, tail, size):
        return "truncated", cut
    return "damaged", f"a {kind} whose header cannot be read"


def _cut(kind: str, head: bytes, tail: bytes, size: int) -> str:
    """What is missing at the end, empty where nothing is."""
    if kind in ENDS and ENDS[kind] not in tail:
        return f"a {kind} without its end mark after {size} bytes"
    # A RIFF file says its size, less the 8 bytes up to there.
    if kind == "WEBP" and size < (wanted := int.from_bytes(head[4:8], "little") + 8):
        return f"a WEBP of {wanted} bytes, of which {size} are there"
    return ""


@contextlib.contextmanager
def _pillow() -> Iterator[None]:
    """Pillow ready for threads, and without its limit of pixels: we have one of our own, and a
    sentence for it."""
    Image.init()  # loads all readers, which Pillow otherwise does one by one
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# ---- tars


def _wrong_tars(one: Listing, tars: list[str]) -> list[str]:
    """A sentence for each tar that is not what its index says."""
    wrong, packed = [], shards.manifest_of(one.root, None) is not None
    for name in track(tars, f"comparing the tars of {one.source}", transient=True):
        tar = one.root / name
        index = tar_index.path_of(tar)
        # In a folder that cannot be written there is none.
        about = tar_index.about(tar) if index.exists() else {}
        try:
            if about and tar_index.scan(tar, packed) != tar_index.rows_of(tar):
                wrong.append(
                    f"{tar}: its index does not fit; copy both again, or remove {index} if the tar "
                    "is right"
                )
            elif about.get("sha256") and about["sha256"] != _sha256(tar):
                wrong.append(
                    f"{tar}: its bytes are not those that were packed (SHA-256); copy it again"
                )
        except UserError as e:
            wrong.append(str(e))
    return wrong


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
        folder, prefix = Path(out), f"{one.root.resolve()}/"
        name = "check-" + re.sub(r"[^\w.-]+", "_", one.source.name) + ".json"
    path = folder / QUARANTINE
    names = read_quarantine(path) if path.exists() else {}
    if whole:
        # What was known of this data is replaced; names of other data stay.
        names = {n: reason for n, reason in names.items() if prefix and not n.startswith(prefix)}
    names |= {prefix + f.name: f"{f.kind}: {f.detail}" for f in bad}
    if broken := [n for n in names if set(n) & set("\t\n\r")]:
        raise UserError(
            f"{one.root}: the name {broken[0]!r} has a tab or line break; rename the file"
        )
    report = dict(
        source=str(one.source),
        images=len(one.files),
        looked_at=seen,
        fast=fast,
        fingerprint=one.fingerprint,
        kinds=Counter(f.kind for f in bad),
        faults=[f._asdict() for f in bad],
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, json.dumps(report, indent=1) + "\n")
        if names or path.exists():
            write_whole(path, "".join(f"{n}\t{reason}\n" for n, reason in sorted(names.items())))
    except OSError as e:
        raise UserError(
            f"{folder}: cannot be written ({e.strerror}); give --out FOLDER and set "
            f"data.quarantine=FOLDER/{QUARANTINE}"
        ) from None
    return path


def _report(one: Listing, bad: list[Fault], seen: int, path: Path, out: Path | None) -> None:
    """Prints a table of the kinds of faults, and the first faults."""
    if not bad:
        say(f"{one.source}: {seen} images, all good")
        return
    table = Table("fault", "images", "the first")
    for kind, n in Counter(f.kind for f in bad).most_common():
        first = next(f.name for f in bad if f.kind == kind)
        table.add_row(kind, str(n), _printable(first))
    console.print(table)
    for f in bad[:SHOWN]:
        say(_printable(f"{f.name}: {f.kind}: {f.detail}"))
    if len(bad) > SHOWN:
        say(f"and {len(bad) - SHOWN} more, see {path}")
    use = "a training leaves them out"
    if out is not None:
        use = f"with data.quarantine={path.resolve()} {use}"
    say(f"{one.source}: {len(bad)} of {seen} images are bad; {path} names them, {use}")


def _printable(text: str) -> str:
    """File names are bytes, which a terminal may not be able to show."""
    return text.encode(errors="surrogateescape").decode(errors="replace")
