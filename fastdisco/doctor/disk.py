"""Space, and speed of writing and reading."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdisco.common import temporary
from fastdisco.data import Listing
from fastdisco.doctor.finding import Finding, failure, ok, size, skipped, warning

MIB = 2**20
# How many small files are written.
SMALL = 5
# Seconds: a checkpoint makes all ranks wait, and so does each line of the log's last file.
_SLOW_CHECKPOINT_S, _SLOW_SYNC_S = 60.0, 1.0
# Images that are read, and the share of the needed rate that warns.
IMAGES, _HEADROOM = 2000, 1.5
# Names in a folder that file systems keep free.
_INODES = 1000


class Writing(NamedTuple):
    """How fast a folder takes bytes that must be on the disk."""

    rate: float  # bytes a second, of one large file with its fsync
    sync: float  # seconds of a small file's fsync, the median


class Reading(NamedTuple):
    """How fast the images come from their disk, on this rank's threads."""

    images: float  # a second
    rate: float  # bytes a second
    dropped: bool  # whether the system's cache was dropped first, as far as it could


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new hidden folder on the disk of `folder`, which is removed afterwards, and at the next call
    where this process was killed.  Raises OSError."""
    beside = existing(folder)
    temporary.sweep(beside)
    made = temporary.part(beside / "doctor")
    made.mkdir()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def space(check: str, folder: Path, needed: float, what: str, key: str) -> Finding:
    """The disk of `folder` has room.

    needed  bytes;  what: says of what;  key: of the configuration, which moves it elsewhere"""
    free = os.statvfs(existing(folder))
    return space_left(
        check, folder, free.f_bavail * free.f_frsize, needed, what, key, free.f_favail
    )


def space_left(
    check: str, folder: Path, free: int, needed: float, what: str, key: str, names: int = 2**30
) -> Finding:
    """The same once it is known how many bytes, and how many names, are free."""
    found = f"{size(free)} free for {folder}, {what} need {size(needed)}"
    remedy = f"make space, or take another {key}"
    # Some file systems have no number of names and give 0.
    if 0 < names < _INODES:
        return failure(check, f"{names} more files can be made for {folder}", remedy)
    if free < needed:
        return failure(check, found, remedy)
    if free < 2 * needed:
        return warning(check, found, f"{remedy}: logs and other programs need space, too")
    return ok(check, found)


def writes(folder: Path, mib: int) -> Writing:
    """Writes a file and some small ones into the folder, each until it is on the disk; they are
    removed again.  Raises OSError."""
    block = np.random.default_rng(0).bytes(MIB)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as f:
        begin = time.perf_counter()
        for _ in range(mib):
            f.write(block)
        os.fsync(f.fileno())
        took = time.perf_counter() - begin
    syncs = []
    for _ in range(SMALL):
        with tempfile.TemporaryFile(dir=folder, buffering=0) as f:
            begin = time.perf_counter()
            f.write(block[:4096])
            os.fsync(f.fileno())
            syncs.append(time.perf_counter() - begin)
    return Writing(mib * MIB / took, sorted(syncs)[SMALL // 2])


def writable(folder: Path, measured: Writing | OSError, checkpoint: float) -> Finding:
    """The run's folder can be written, and a checkpoint takes no minute.

    measured    what `writes` gave or raised
    checkpoint  bytes, 0 where it is not known"""
    if isinstance(measured, OSError):
        what = f"{folder} cannot be written ({measured.strerror or measured})"
        return failure("write", what, "take another run.out, or correct the folder's rights")
    takes = checkpoint / measured.rate
    found = f"{measured.rate / MIB:.0f} MiB/s to {folder}, fsync {measured.sync * 1e3:.1f} ms"
    if checkpoint:
        found += f", a checkpoint in {takes:.1f} s"
    if takes > _SLOW_CHECKPOINT_S:
        return warning("write", found, "raise checkpoint.every, or take a faster disk for run.out")
    if measured.sync > _SLOW_SYNC_S:
        return warning("write", found, "take another disk for run.out: this one is very busy")
    return ok("write", found)


def reads(listing: Listing, threads: int, images: int = IMAGES) -> Reading:
    """Reads images in random order, on so many threads.  The system is asked to forget what it has
    cached of their files; on a network disk the server's cache stays.  Raises OSError."""
    chosen = np.random.default_rng(0).permutation(listing.kept)[:images].tolist()
    dropped = _forget(listing, chosen)
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        total = sum(pool.map(lambda i: len(listing.read(i)), chosen))
        took = time.perf_counter() - begin
    return Reading(len(chosen) / took, total / took, dropped)


def feeds(measured: Reading | OSError, needed: float, ranks: int) -> Finding:
    """The disk gives images as fast as the step takes them.

    needed  images a second on this machine if data were always there; 0 where it is not known
    ranks   of this machine, which share the disk"""
    if isinstance(measured, OSError):
        what = f"an image cannot be read ({measured.strerror or measured}: {measured.filename})"
        return failure("read", what, "see fastdisco data check")
    found = f"{measured.images:.0f} images/s, {measured.rate / MIB:.1f} MiB/s"
    if not measured.dropped:
        found += " (partly from the system's cache)"
    if not needed:
        return ok("read", found)
    found += f"; {ranks} rank{'s' * (ranks > 1)} could take {needed:.0f} images/s"
    if measured.images < needed:
        remedy = "pack the data into tars (fastdisco data pack), or copy it to a local disk"
        return warning("read", found, remedy)
    if measured.images < _HEADROOM * needed:
        return warning("read", found, "the disk has no headroom: nothing else should read from it")
    return ok("read", found)


def shared(seen: list[tuple[str, bool, str]]) -> Finding:
    """All nodes see the run's folder.

    seen: for each rank its node, whether it sees what rank 0 has written there, and its path"""
    blind = {node: path for node, sees, path in seen if not sees}
    nodes = {node for node, _, _ in seen}
    if len(seen) == 1:
        return skipped("shared folder", "one rank")
    if blind:
        node, path = next(iter(blind.items()))
        others = f" and {len(blind) - 1} other nodes" if len(blind) > 1 else ""
        what = f"{node}{others} does not see in {path} what rank 0 writes there"
        return failure("shared folder", what, "give run.out a folder that all nodes share")
    return ok("shared folder", f"{len(seen)} ranks on {len(nodes)} nodes see it")


def _forget(listing: Listing, chosen: list[int]) -> bool:
    """Asks the system to drop the files of these images from its cache; whether it took all."""
    if listing.places:
        names = {listing.places.tars[t] for t in np.unique(listing.places.tar[chosen])}
    else:
        names = {listing.files[i] for i in chosen}
    try:
        for name in names:
            with open(listing.root / name, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    return True
