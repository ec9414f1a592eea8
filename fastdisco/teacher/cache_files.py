"""The files of recorded embeddings, mapped into memory.

FOLDER/cache.json  what the embeddings are of; written when the other two have their size
FOLDER/z.f16       [rounds,slots,V,d] float16: unit rows, since the losses normalise and a half ends
                   at 65504; slots: images, in whole blocks
FOLDER/sums.u32    [rounds,slots] uint32: checksum of an image's rows in z.f16; 0: not recorded"""

import fcntl
import json
import mmap
import os
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastdisco.common.errors import UserError
from fastdisco.common.files import naming, write_whole

VERSION = 1
COMMAND = "`fastdisco teacher record --config ...`"


def header(folder: Path) -> dict[str, Any] | None:
    """What cache.json says; None where there is none.  Raises UserError where it is damaged."""
    path = folder / "cache.json"
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, not an object")
        counts = found.get("rounds"), found.get("block", 1)
        if not all(type(n) is int and 0 < n < 2**31 for n in counts):
            raise ValueError("rounds or block is no count")
        if not isinstance(found.get("teacher"), str):
            raise ValueError("teacher is no fingerprint")
        return found
    except FileNotFoundError:
        return None
    # RecursionError: brackets in brackets, by the thousand.
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(
            f"{path}: cannot be read ({e}); take another teacher.cache_folder, or remove this "
            "one and record anew"
        ) from None


def checksums(rows: np.ndarray) -> np.ndarray:
    """[n,V,d] float16 -> [n] uint32: a sum of 16-bit words times odd numbers, which any one changed
    word changes; never 0."""
    words = rows.reshape(len(rows), -1).view(np.uint16).astype(np.uint32)
    odd = np.arange(words.shape[1], dtype=np.uint32) * np.uint32(0x9E3779B2) | np.uint32(1)
    return np.maximum((words * odd).sum(1, dtype=np.uint32), 1)


class Files:
    """z.f16 and sums.u32 as arrays, once `map` has opened them."""

    z: np.ndarray
    sums: np.ndarray

    def __init__(self, folder: Path, slots: int, row: tuple[int, int]) -> None:
        """row: views and width of an image's embeddings."""
        self.folder, self.slots, self.row = folder, slots, row

    def map(self, rounds: int, write: bool = False) -> None:
        """Opens both files; of a network disk this shows what other machines have written."""
        shape = rounds, self.slots
        self._z_map, self.z = _mapped(self.folder / "z.f16", np.float16, (*shape, *self.row), write)
        self._sums_map, self.sums = _mapped(self.folder / "sums.u32", np.uint32, shape, write)

    def flush(self) -> None:
        """Writes to disk what has changed; z first, for a checksum says that its rows are there."""
        with naming(self.folder):
            self._z_map.flush()
            self._sums_map.flush()

    def read_ahead(self, r: int) -> None:
        """Has the system read the whole round: random rows would come one by one."""
        size, page = self.z[0].nbytes, mmap.PAGESIZE
        self._z_map.madvise(mmap.MADV_WILLNEED, r * size // page * page, size)

    def good(self, r: int, block: int) -> np.ndarray:
        """[slots] bool: whose rows are recorded in the round and agree with their checksums."""
        good = np.zeros(self.slots, bool)
        for first in range(0, self.slots, block):
            part = slice(first, first + block)
            # Of a block without checksums nothing is read.
            if self.sums[r, part].any():
                good[part] = self.sums[r, part] == checksums(self.z[r, part])
        return good

    def refuse_cut_short(self, rounds: int) -> None:
        """Raises UserError for a file that is shorter than its header says."""
        for name, size in self._sizes(rounds).items():
            path = self.folder / name
            has = path.stat().st_size if path.exists() else 0
            if has < size:
                raise UserError(
                    f"{path}: cut short, {has} of {size} bytes; remove {self.folder} and record "
                    f"anew by {COMMAND}"
                )

    def allocate(self, rounds: int, about: dict[str, Any]) -> None:
        """Makes room for that many rounds, and writes the header.  What the files hold stays, the
        rest is zeros."""
        for name, size in self._sizes(rounds).items():
            with (self.folder / name).open("ab") as f:
                try:
                    # The space is taken now: writing into a mapped file on a full disk kills.
                    os.posix_fallocate(f.fileno(), 0, size)
                except OSError as e:
                    raise UserError(
                        f"{self.folder / name}: {size} bytes cannot be taken there ({e.strerror}); "
                        "make space, take another teacher.cache_folder or lower "
                        "teacher.cache_rounds"
                    ) from None
        write_whole(self.folder / "cache.json", json.dumps(about, indent=1) + "\n")

    def lock(self) -> TextIO:
        """An open file that keeps other commands from recording there until it is closed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        f = (self.folder / "lock").open("w")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{self.folder}: another command is recording there; wait for its end, then this "
                "one finds what it recorded"
            ) from None
        return f

    def _sizes(self, rounds: int) -> dict[str, int]:
        """Bytes of the files."""
        images, (views, dim) = rounds * self.slots, self.row
        return {"z.f16": images * views * dim * 2, "sums.u32": images * 4}


def _mapped(
    path: Path, dtype: type, shape: tuple[int, ...], write: bool
) -> tuple[mmap.mmap, np.ndarray]:
    with path.open("r+b" if write else "rb") as f:
        m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ)
    return m, np.frombuffer(m, dtype, int(np.prod(shape))).reshape(shape)
