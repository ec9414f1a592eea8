"""Packs images into WebDataset tars in an order that is random over all of them, with an index of
each tar and a manifest.

The same source, seed and size give the same bytes; what was killed goes on with the first tar that
has no index."""

import hashlib
import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.progress import Progress

from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.common.limits import SHARD_MB
from fastdisco.data import cifar, shards
from fastdisco.data.folder import Listing
from fastdisco.data.loader import permutation
from fastdisco.data.source import listing, read_quarantine

QUARANTINE = "quarantine.txt"
FIRST = 2**63  # the order's epoch: none of the training


class Images(NamedTuple):
    """What is packed; the position of an image is its index for good."""

    labels: np.ndarray  # [N] int64
    classes: list[str]
    read: Callable[[int], tuple[str, bytes]]  # index -> extension and encoded image
    fingerprint: str
    # Of the quarantine; packed too, since indices stay, and named in the new one.
    left_out: dict[int, str]


def pack(
    src: Path, dst: Path, seed: int = 0, shard_mb: float = SHARD_MB, jpeg: int | None = None
) -> dict[Path, dict]:
    """Packs class folders, a list file or tars into dst, or CIFAR's python archive into dst/train
    and dst/val; returns {folder: manifest}.

    shard_mb  a tar has at most so many MiB
    jpeg      quality of CIFAR's images; None: PNG, which loses nothing.  Encoded images are packed
              as they are.
    Raises UserError for a source or a folder that does not fit, and for an image file that is a
    link: none is followed."""
    src, dst = Path(src), Path(dst)
    if cifar.is_archive(src):
        parts = {dst / name: _cifar(*part, jpeg) for name, part in cifar.load(src).items()}
    elif jpeg is not None:
        raise UserError(
            f"{src}: --jpeg encodes the images of CIFAR's python archives; files are packed as "
            "they are, leave it out"
        )
    else:
        found = listing(src)
        if found.source.is_dir() and dst.resolve().is_relative_to(found.root.resolve()):
            raise UserError(
                f"{dst}: lies in {found.root}, whose images its own would join; give a folder "
                "outside of it"
            )
        parts = {dst: _listed(found)}
    return {
        folder: _write(folder, images, seed, int(shard_mb * 2**20))
        for folder, images in parts.items()
    }


def _listed(found: Listing) -> Images:
    if found.places is None:
        if link := next((f for f in found.files if (found.root / f).is_symlink()), None):
            raise UserError(
                f"{found.root / link}: is a link, and none is followed; put the file itself there"
            )
    path = found.root / QUARANTINE
    left_out = {
        found.number[n]: reason
        for n, reason in (read_quarantine(path) if path.exists() else {}).items()
        if n in found.number
    }

    def read(i):
        name = found.files[i]
        extension = name.rpartition(".")[2].lower()
        try:
            if found.places:
                return extension, found.read(i)
            with os.fdopen(os.open(found.root / name, os.O_RDONLY | os.O_NOFOLLOW), "rb") as f:
                return extension, f.read()
        except OSError as e:
            raise UserError(
                f"{found.root / name}: cannot be read ({e.strerror or e}); put it right, then give "
                "the same command again"
            ) from None

    return Images(found.labels, found.classes, read, found.fingerprint, left_out)


def _cifar(pixels: np.ndarray, labels: np.ndarray, classes: list[str], jpeg: int | None) -> Images:
    """pixels: [N,32,32,3] uint8"""
    extension, options = (
        ("png", dict(format="PNG")) if jpeg is None else ("jpg", dict(format="JPEG", quality=jpeg))
    )

    def read(i):
        out = io.BytesIO()
        Image.fromarray(pixels[i]).save(out, **options)
        return extension, out.getvalue()

    digest = hashlib.sha256(
        pixels.tobytes() + labels.tobytes() + f"{extension} {jpeg}".encode()
    ).hexdigest()
    return Images(labels, classes, read, digest, {})


def _write(dst: Path, images: Images, seed: int, limit: int) -> dict:
    """The tars of one set and their manifest."""
    wanted = dict(version=1, seed=seed, shard_bytes=limit, source=images.fingerprint)
    if (dst / shards.MANIFEST).exists():
        return _reuse(dst, shards.MANIFEST, wanted)
    if (dst / shards.BEGUN).exists():
        _reuse(dst, shards.BEGUN, wanted)
    elif dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(
            f"{dst}: not empty and not begun by this command; give an empty or new folder"
        )
    dst.mkdir(parents=True, exist_ok=True)
    write_whole(dst / shards.BEGUN, json.dumps(wanted, indent=1))
    order = permutation(seed, FIRST, len(images.labels))
    tars, done = {}, 0
    with Progress(transient=True) as bar, ThreadPoolExecutor() as pool:
        task = bar.add_task(f"packing {dst}", total=len(order))
        while done < len(order):
            tar = dst / f"{len(tars):06}.tar"
            about, rows = _finished(tar) or _tar(
                tar,
                order[done:],
                images,
                limit,
                pool,
                lambda n: bar.update(task, completed=done + n),
            )
            if [row.index for row in rows] != order[done : done + len(rows)].tolist():
                raise UserError(
                    f"{tar}: its index is of other samples than this command packs; remove it and "
                    "give the command again"
                )
            done += len(rows)
            tars[tar.name] = dict(bytes=about["bytes"], samples=len(rows), sha256=about["sha256"])
            bar.update(task, completed=done)
    if images.left_out:
        names = {
            row.index: f"{tar}/{row.name}" for tar in tars for row in shards.rows_of(dst / tar)
        }
        write_whole(
            dst / QUARANTINE,
            "".join(f"{names[i]}\t{reason}\n" for i, reason in sorted(images.left_out.items())),
        )
    counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
    manifest = wanted | dict(
        samples=len(order),
        bytes=sum(t["bytes"] for t in tars.values()),
        classes=images.classes,
        class_counts=counts,
        tars=tars,
    )
    write_whole(dst / shards.MANIFEST, json.dumps(manifest, indent=1))
    for left in dst.glob("*.part"):  # of attempts that were killed; a glob finds hidden ones too
        left.unlink()
    (dst / shards.BEGUN).unlink()
    return manifest


def _reuse(dst: Path, name: str, wanted: dict) -> dict:
    try:
        found = json.loads((dst / name).read_text())
    except (OSError, ValueError) as e:
        raise UserError(
            f"{dst / name}: cannot be read ({e}); remove the folder and pack again"
        ) from None
    if differ := [key for key, value in wanted.items() if found.get(key) != value]:
        raise UserError(
            f"{dst}: holds tars of another {', '.join(differ)}; give a new folder, or remove this "
            "one"
        )
    return found


def _finished(tar: Path) -> tuple[dict, list[shards.Row]] | None:
    """The index of a tar that is complete."""
    try:
        about = shards.about(tar)
        return (about, shards.rows_of(tar)) if tar.stat().st_size == about["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def _tar(
    tar: Path,
    order: np.ndarray,
    images: Images,
    limit: int,
    pool: ThreadPoolExecutor,
    seen: Callable[[int], None],
) -> tuple[dict, list[shards.Row]]:
    """Writes a tar of the first images of `order` that fit, then its index."""
    part, rows, at, sha = tar.with_suffix(".part"), [], 0, hashlib.sha256()
    part.unlink(missing_ok=True)  # so that nothing else is written through a link of that name
    with open(part, "xb") as f:

        def put(data: bytes):
            nonlocal at
            f.write(data)
            sha.update(data)
            at += len(data)

        for i, (extension, content) in zip(
            order.tolist(), ahead(pool, images.read, order.tolist())
        ):
            label, stem = images.labels[i], f"{i:09}"
            sample = [
                _member(f"{stem}.{extension}", content),
                _member(f"{stem}.cls", str(label).encode()),
                _member(f"{stem}.idx", str(i).encode()),
            ]
            if _ended(at + sum(map(len, sample))) > limit:
                if rows:
                    break
                raise UserError(
                    f"{tar}: image {i} has {len(content)} bytes, more than a tar may have "
                    f"({limit}); raise --shard-mb"
                )
            rows.append(
                shards.Row(i, label, at + tarfile.BLOCKSIZE, len(content), f"{stem}.{extension}")
            )
            for member in sample:
                put(member)
            seen(len(rows))
        put(bytes(_ended(at) - at))
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, tar)
    about = shards.header(at, sha.hexdigest())
    write_whole(tar.with_suffix(".index"), shards.index_text(about, rows))
    return about, rows


def _member(name: str, content: bytes) -> bytes:
    """A file in a tar, with nothing in its header that another machine or day would change."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _ended(size: int) -> int:
    """Bytes of a tar with `size` bytes of members: two empty blocks more, in whole records."""
    return -(-(size + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def ahead(
    pool: ThreadPoolExecutor, function: Callable, items: Iterable, depth: int = 64
) -> Iterator:
    """map() by threads that are at most `depth` items ahead."""
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
