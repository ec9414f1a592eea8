"""Packs images into WebDataset tars in an order that is random over all of them, with an index of
each tar and a manifest.  This is `fastdisco data pack`.

The same source, seed and size give the same bytes.  A pack that was killed continues with the first
tar that has no index."""

import hashlib
import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from rich.progress import Progress

from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.common.files import naming, read_json, write_whole
from fastdisco.common.limits import SHARD_MB
from fastdisco.common.urls import Url, addressed
from fastdisco.data import cifar, lines, pack_remote, tar_index
from fastdisco.data.folder import Listing, told
from fastdisco.data.loader import permutation
from fastdisco.data.manifest import BEGUN, MANIFEST, VERSION, fault, text_of
from fastdisco.data.source import listing, read_quarantine
from fastdisco.data.tar_index import Row

QUARANTINE = "quarantine.txt"
FIRST = 2**63  # stands for the epoch in the order's key; no training reaches it

Item = TypeVar("Item")
Result = TypeVar("Result")


class Images(NamedTuple):
    """What is packed.  The position of an image is its stable index."""

    labels: np.ndarray  # [N] int64
    classes: list[str]
    read: Callable[[int], tuple[str, bytes]]  # index -> extension and encoded image
    fingerprint: str
    # {index: reason} of the source's quarantine.  These are packed, too, since indices stay, and
    # named in the new quarantine.
    left_out: dict[int, str]


def pack(
    src: Path, dst: Path, seed: int = 0, shard_mb: float = SHARD_MB, jpeg: int | None = None
) -> dict[Path, dict[str, Any]]:
    """Packs class folders, a list file or tars into dst, or CIFAR's python archive into dst/train
    and dst/val; both may be addresses in object storage.  Returns {folder: manifest}.

    shard_mb  a tar has at most so many MiB
    jpeg      quality of CIFAR's images; None: PNG, which loses nothing.  Encoded images are packed
              as they are.
    Raises UserError for a source or a folder that does not fit, and for an image file that is a
    link, since links are never followed."""
    src, dst = addressed(src), addressed(dst)
    if cifar.is_archive(src):
        parts = {dst / name: _cifar(*part, jpeg) for name, part in cifar.load(src).items()}
    elif jpeg is not None:
        raise UserError(
            f"{src}: --jpeg encodes the images of CIFAR's python archives; files are packed as "
            "they are, leave it out"
        )
    else:
        found = listing(src)
        inside = not found.remote and not isinstance(dst, Url)
        if inside and src.is_dir() and dst.resolve().is_relative_to(found.root.resolve()):
            raise UserError(
                f"{dst}: lies in {found.root}, whose images its own would join; give a folder "
                "outside of it"
            )
        if found.passed_over:
            say(f"{src}: passed over: {lines.printable(told(found.passed_over))}")
        parts = {dst: _listed(found)}
    limit = int(shard_mb * 2**20)
    return {folder: _written(folder, images, seed, limit) for folder, images in parts.items()}


# ---- what is packed


def _listed(found: Listing) -> Images:
    """The images of a data set as they are."""
    if found.places is None:
        _refuse_links(found)
    path = found.root / QUARANTINE
    reasons = read_quarantine(path) if path.exists() else {}
    left_out = {found.number[n]: reason for n, reason in reasons.items() if n in found.number}

    def read(i: int) -> tuple[str, bytes]:
        name = found.files[i]
        extension = name.rpartition(".")[2].lower()
        try:
            if found.places:
                return extension, found.read(i)
            # O_NOFOLLOW: the file may have become a link since it was looked at.
            with os.fdopen(os.open(found.root / name, os.O_RDONLY | os.O_NOFOLLOW), "rb") as f:
                return extension, f.read()
        except OSError as e:
            raise UserError(
                f"{found.root / name}: cannot be read ({e.strerror or e}); put it right, then give "
                "the same command again"
            ) from None

    return Images(found.labels, found.classes, read, found.fingerprint, left_out)


def _refuse_links(found: Listing) -> None:
    for name in found.files:
        if (found.root / name).is_symlink():
            raise UserError(
                f"{found.root / name}: is a link, and none is followed; put the file itself there"
            )


def _cifar(pixels: np.ndarray, labels: np.ndarray, classes: list[str], jpeg: int | None) -> Images:
    """pixels: [N,32,32,3] uint8"""
    extension = "png" if jpeg is None else "jpg"

    def read(i: int) -> tuple[str, bytes]:
        out, image = io.BytesIO(), Image.fromarray(pixels[i])
        if jpeg is None:
            image.save(out, format="PNG")
        else:
            image.save(out, format="JPEG", quality=jpeg)
        return extension, out.getvalue()

    content = pixels.tobytes() + labels.tobytes() + f"{extension} {jpeg}".encode()
    return Images(labels, classes, read, hashlib.sha256(content).hexdigest(), {})


# ---- a folder of tars


def _written(dst: Path, images: Images, seed: int, limit: int) -> dict[str, Any]:
    """As `_write`, also to object storage."""
    if not isinstance(dst, Url):
        return _write(dst, images, seed, limit)
    write = lambda folder, done: _write(folder, images, seed, limit, done)
    return pack_remote.to(dst, write, QUARANTINE)


def _write(
    dst: Path,
    images: Images,
    seed: int,
    limit: int,
    done: Callable[[Path], None] = lambda tar: None,
) -> dict[str, Any]:
    """Writes the tars of one set, at most `limit` bytes each, and returns their manifest.  Goes on
    where an earlier call with the same arguments was killed.

    done: is called with each tar that is whole, also with those of an earlier call"""
    wanted = dict(version=VERSION, seed=seed, shard_bytes=limit, source=images.fingerprint)
    if (dst / MANIFEST).exists():
        return _reuse(dst, MANIFEST, wanted)
    if (dst / BEGUN).exists():
        _reuse(dst, BEGUN, wanted)
    elif dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(
            f"{dst}: not empty and not begun by this command; give an empty or new folder"
        )
    dst.mkdir(parents=True, exist_ok=True)
    write_whole(dst / BEGUN, json.dumps(wanted, indent=1))
    tars = _tars(dst, images, permutation(seed, FIRST, len(images.labels)), limit, done)
    if images.left_out:
        _write_quarantine(dst, list(tars), images.left_out)
    manifest = wanted | dict(
        samples=len(images.labels),
        bytes=sum(t["bytes"] for t in tars.values()),
        classes=images.classes,
        class_counts=np.bincount(images.labels, minlength=len(images.classes)).tolist(),
        tars=tars,
    )
    write_whole(dst / MANIFEST, text_of(manifest))
    # Left by attempts that were killed; the pattern finds hidden files, too.
    for part in dst.glob("*.part"):
        part.unlink()
    (dst / BEGUN).unlink()
    return manifest


def _tars(
    dst: Path, images: Images, order: np.ndarray, limit: int, whole: Callable[[Path], None]
) -> dict[str, dict[str, Any]]:
    """Writes the tars that are not there yet, and calls whole() with each.  Returns {name: bytes,
    samples and SHA-256}."""
    tars, done = {}, 0
    with Progress(transient=True) as bar, ThreadPoolExecutor() as pool:
        task = bar.add_task(f"packing {dst}", total=len(order))
        advance = lambda: bar.advance(task)
        while done < len(order):
            tar = dst / f"{len(tars):06}.tar"
            # A tar of an earlier attempt counts if its index is there; else it is written again.
            about, rows = _finished(tar) or _tar(tar, order[done:], images, limit, pool, advance)
            if [row.index for row in rows] != order[done : done + len(rows)].tolist():
                raise UserError(
                    f"{tar}: its index is of other samples than this command packs; remove it and "
                    "give the command again"
                )
            whole(tar)
            done += len(rows)
            tars[tar.name] = dict(bytes=about["bytes"], samples=len(rows), sha256=about["sha256"])
            bar.update(task, completed=done)
    return tars


def _write_quarantine(dst: Path, tars: list[str], reasons: dict[int, str]) -> None:
    """reasons: {index: reason}"""
    names = {row.index: f"{tar}/{row.name}" for tar in tars for row in tar_index.rows_of(dst / tar)}
    lines = [f"{names[i]}\t{reason}\n" for i, reason in sorted(reasons.items())]
    write_whole(dst / QUARANTINE, "".join(lines))


def _reuse(dst: Path, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of that name, if it is of the same pack."""
    try:
        found = read_json(dst / name)
    except (OSError, ValueError) as e:
        raise UserError(
            f"{dst / name}: cannot be read ({e}); remove the folder and pack again"
        ) from None
    if not isinstance(found, dict) or (name == MANIFEST and fault(found)):
        raise UserError(f"{dst / name}: damaged; remove the folder and pack again")
    found.pop("checksum", None)
    if differ := [key for key, value in wanted.items() if found.get(key) != value]:
        raise UserError(
            f"{dst}: holds tars of another {', '.join(differ)}; give a new folder, or remove this "
            "one"
        )
    return found


def _finished(tar: Path) -> tuple[dict[str, Any], list[Row]] | None:
    """The index of a tar that is complete, else None."""
    try:
        about = tar_index.about(tar)
        return (about, tar_index.rows_of(tar)) if tar.stat().st_size == about["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


# ---- a tar


def _tar(
    tar: Path,
    order: np.ndarray,
    images: Images,
    limit: int,
    pool: ThreadPoolExecutor,
    advance: Callable[[], None],
) -> tuple[dict[str, Any], list[Row]]:
    """Writes a tar of the first images of `order` that fit, then its index, which it returns.  It
    calls advance() after each image."""
    part, rows, size, sha = tar.with_suffix(".part"), [], 0, hashlib.sha256()
    # With mode x below, nothing is written through a link of that name.
    part.unlink(missing_ok=True)
    with naming(tar), open(part, "xb") as f:
        for i, (extension, content) in zip(
            order.tolist(), ahead(pool, images.read, order.tolist())
        ):
            label, name = images.labels[i], f"{i:09}.{extension}"
            sample = _sample(i, label, name, content)
            if _ended(size + len(sample)) > limit:
                if rows:
                    break
                raise UserError(
                    f"{tar}: image {i} has {len(content)} bytes, more than a tar may have "
                    f"({limit}); raise --shard-mb"
                )
            # The image is the sample's first member, after its header block.
            rows.append(Row(i, label, size + tarfile.BLOCKSIZE, len(content), name))
            f.write(sample)
            sha.update(sample)
            size += len(sample)
            advance()
        end = bytes(_ended(size) - size)
        f.write(end)
        sha.update(end)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, tar)
    # The index comes last: a tar that has one is complete.
    about = tar_index.header(tar, rows, sha.hexdigest())
    write_whole(tar_index.path_of(tar), tar_index.index_text(about, rows))
    return about, rows


def _sample(index: int, label: int, name: str, content: bytes) -> bytes:
    """The bytes of a sample in a tar: image, class and index."""
    return (
        _member(name, content)
        + _member(f"{index:09}.cls", str(label).encode())
        + _member(f"{index:09}.idx", str(index).encode())
    )


def _member(name: str, content: bytes) -> bytes:
    """The bytes of a file in a tar, with nothing in its header that another machine or day would
    change."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _ended(size: int) -> int:
    """Bytes of a tar with `size` bytes of members: two empty blocks more, rounded up to whole
    records."""
    records = -(-(size + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE)
    return records * tarfile.RECORDSIZE


def ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    depth: int = 64,
) -> Iterator[Result]:
    """map() by threads that are at most `depth` items ahead of the caller."""
    waiting: deque[Future[Result]] = deque()
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
