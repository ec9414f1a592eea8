"""Looks at every image of a data set before the training does: `fastdisco data check`."""

import hashlib
import io
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from rich.table import Table

from fastdisco.common.console import console, say, shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.common.limits import MAX_PIXELS
from fastdisco.data import shards
from fastdisco.data.decoder import Decoder
from fastdisco.data.folder import Listing
from fastdisco.data.pack import QUARANTINE, ahead
from fastdisco.data.source import listing, read_quarantine, same_classes

BATCH = 64, 50_000_000  # images and pixels that are decoded at a time
# What DALI reads, by Pillow's names.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM")
# In the last bytes of a whole file; MPO is a JPEG with more behind it.
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n": "PNG",
    b"RIFF": "WEBP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}


class Fault(NamedTuple):
    index: int
    name: str
    kind: str  # empty, truncated, damaged, not an image, too large, unreadable
    detail: str


def check(
    sources: list[Path],
    fast: bool = False,
    out: Path | None = None,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
    only: list[str] | None = None,
    devices: tuple[torch.device, ...] = (torch.device("cpu"),),
) -> list[Fault]:
    """Finds images that a training cannot or should not read, and writes check.json and
    quarantine.txt into each data set's folder, or into
    `out`.  Returns the faults.

    fast     headers and ends alone; else every image is decoded on each of the devices, and tars
             are compared with index and SHA-256
    only     names of the images to look at
    What a whole, slow check finds replaces the quarantine of that data; what a fast or partial one
    finds is added.
    Raises UserError for tars that do not fit, and where a source has other classes than the
    first."""
    found = [listing(s) for s in sources]
    for other in found[1:]:
        same_classes(found[0], other)
    threads, faults = threads or len(os.sched_getaffinity(0)), []
    for one in found:
        indices = shards.reading_order(one, _named(one, only))
        wrong = _tars(one) if one.places and not (fast or only) else []
        bad = _faults(one, indices, fast, threads, max_pixels, devices)
        path = _write(one, bad, len(indices), fast, whole=not (fast or only), out=out)
        _tell(one, bad, len(indices), path, out)
        if wrong:
            raise UserError("; ".join(wrong))
        faults += bad
    return faults


def look(
    one: Listing, index: int, fast: bool, max_pixels: int
) -> tuple[Fault | None, bytes, int, str]:
    """What can be said of an image without decoding it; its bytes (none if fast), pixels, and what
    its end says of a fault found later."""

    def fault(kind, detail):
        return Fault(index, one.files[index], kind, detail), b"", 0, ""

    try:
        with one.open(index) as f:
            if not fast:
                f = io.BytesIO(f.read())
            size = f.seek(0, io.SEEK_END)
            f.seek(max(0, size - 4096))
            tail = f.read()
            f.seek(0)
            if not size:
                return fault("empty", "has no bytes")
            head = f.read(16)
            f.seek(0)
            try:
                with Image.open(f, formats=FORMATS) as image:
                    kind, (width, height) = image.format, image.size
            except Exception:  # Pillow's readers raise anything on foreign bytes
                kind = next((k for start, k in STARTS.items() if head.startswith(start)), None)
                if kind is None:
                    return fault(
                        "not an image",
                        f"begins with {head[:8]!r}, no format that DALI reads; convert or remove "
                        "it",
                    )
                if cut := _cut(kind, head, tail, size):
                    return fault("truncated", cut)
                return fault("damaged", f"a {kind} whose header cannot be read")
            if width * height > max_pixels:
                return fault(
                    "too large",
                    f"{width} x {height} pixels, more than {max_pixels}; shrink it or raise "
                    "--max-pixels",
                )
            cut = _cut(kind, head, tail, size)
            if fast and cut:
                return fault("truncated", cut)
            return None, b"" if fast else f.getvalue(), width * height, cut
    except OSError as e:
        return fault("unreadable", f"{e.strerror or e}; replace it")


def _cut(kind: str, head: bytes, tail: bytes, size: int) -> str:
    """What is missing at the end."""
    if kind in ENDS and ENDS[kind] not in tail:
        return f"a {kind} without its end mark after {size} bytes"
    if kind == "WEBP" and size < (wanted := int.from_bytes(head[4:8], "little") + 8):
        return f"a WEBP of {wanted} bytes, of which {size} are there"
    return ""


def _faults(
    one: Listing, indices: np.ndarray, fast: bool, threads: int, max_pixels: int, devices
) -> list[Fault]:
    found, waiting, pixels = {}, [], 0
    decoders = [] if fast else [Decoder(d, BATCH[0], threads) for d in devices]

    def decode():
        for decoder in decoders:
            for j, words in decoder.faults(
                [content for _, content, _ in waiting], complaints=True
            ).items():
                index, _, cut = waiting[j]
                found.setdefault(
                    index,
                    Fault(index, one.files[index], "truncated" if cut else "damaged", cut or words),
                )
        waiting.clear()

    Image.init()  # all of Pillow's readers, which it loads only by and by
    # We have a limit of our own, and a sentence for it.
    guard, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with ThreadPoolExecutor(threads) as pool:
            looks = ahead(pool, lambda i: look(one, i, fast, max_pixels), indices.tolist())
            for index, (fault, content, area, cut) in zip(
                indices.tolist(),
                track(looks, f"checking {one.source}", len(indices), transient=True),
            ):
                if fault:
                    found[index] = fault
                elif not fast:
                    if waiting and (len(waiting) == BATCH[0] or pixels + area > BATCH[1]):
                        decode()
                        pixels = 0
                    waiting.append((index, content, cut))
                    pixels += area
        if waiting:
            decode()
    finally:
        Image.MAX_IMAGE_PIXELS = guard
    return [found[i] for i in sorted(found)]


def _tars(one: Listing) -> list[str]:
    """A sentence for each tar that is not what its index says."""
    wrong, packed = [], shards.manifest_of(one.root, None) is not None
    for name in track(one.places.tars, f"comparing the tars of {one.source}", transient=True):
        tar = one.root / name
        about = shards.about(tar) if tar.with_suffix(".index").exists() else {}
        try:
            if about and shards.scan(tar, packed) != shards.rows_of(tar):
                wrong.append(
                    f"{tar}: its index does not fit; copy both again, or remove "
                    f"{tar.with_suffix('.index')} if the tar is right"
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


def _named(one: Listing, only: list[str] | None) -> np.ndarray:
    if only is None:
        return np.arange(len(one.files))
    if strange := [n for n in only if n not in one.number]:
        raise UserError(
            f"{one.source}: has no image {shorten(strange)}; give names as they stand in the "
            f"listing, for example {one.files[0]}"
        )
    return np.unique([one.number[n] for n in only])


def _write(
    one: Listing, bad: list[Fault], seen: int, fast: bool, whole: bool, out: Path | None
) -> Path:
    """The report and the quarantine, whose path is returned; names are absolute in one that lies
    elsewhere."""
    folder, prefix = (one.root, "") if out is None else (Path(out), f"{one.root.resolve()}/")
    path = folder / QUARANTINE
    names = read_quarantine(path) if path.exists() else {}
    if whole:
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
        name = (
            "check.json"
            if out is None
            else "check-" + re.sub(r"[^\w.-]+", "_", one.source.name) + ".json"
        )
        write_whole(folder / name, json.dumps(report, indent=1) + "\n")
        if names or path.exists():
            write_whole(path, "".join(f"{n}\t{reason}\n" for n, reason in sorted(names.items())))
    except OSError as e:
        raise UserError(
            f"{folder}: cannot be written ({e.strerror}); give --out FOLDER and set "
            f"data.quarantine=FOLDER/{QUARANTINE}"
        ) from None
    return path


def _tell(one: Listing, bad: list[Fault], seen: int, path: Path, out: Path | None):
    if not bad:
        say(f"{one.source}: {seen} images, all good")
        return
    table = Table("fault", "images", "the first")
    for kind, n in Counter(f.kind for f in bad).most_common():
        table.add_row(
            kind,
            str(n),
            next(f.name for f in bad if f.kind == kind)
            .encode(errors="surrogateescape")
            .decode(errors="replace"),
        )
    console.print(table)
    for f in bad[:20]:
        # Names are bytes.
        say(
            f"{f.name}: {f.kind}: {f.detail}".encode(errors="surrogateescape").decode(
                errors="replace"
            )
        )
    if len(bad) > 20:
        say(f"and {len(bad) - 20} more, see {path}")
    use = (
        "a training leaves them out"
        if out is None
        else f"with data.quarantine={path.resolve()} a training leaves them out"
    )
    say(f"{one.source}: {len(bad)} of {seen} images are bad; {path} names them, {use}")
