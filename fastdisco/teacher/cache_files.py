"""The files of recorded embeddings.  They are read and written, not mapped: a mapped file that is
cut short meanwhile ends the process by a signal.

FOLDER/cache.json  what the embeddings are of; written when the other two have their size
FOLDER/z.f16       [rounds,slots,V,d] float16: unit rows, since the losses normalise and a half ends
                   at 65504; slots: images, in whole blocks
FOLDER/sums.u32    [rounds,slots] uint32: checksum of an image's rows in z.f16; 0: not recorded"""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastdisco.common.errors import UserError
from fastdisco.common.files import naming, open_regular, write_whole

VERSION = 1
MOST = 1 << 31  # rounds, and images of a block
COMMAND = "`fastdisco teacher record --config ...`"


def header(folder: Path) -> dict[str, Any] | None:
    """What cache.json says; None where there is none.  Raises UserError where it is damaged."""
    path = folder / "cache.json"
    try:
        with open_regular(path) as f:
            found = json.loads(f.read())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, not an object")
        counts = found.get("rounds"), found.get("block", 1)
        if not all(type(n) is int and 0 < n < MOST for n in counts):
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
    """z.f16 and sums.u32, once `open` has opened them.

    Shapes: n images, V views of width d.  `indices` [n] are images, int64.
    What reads raises UserError for a file that is cut short."""

    def __init__(self, folder: Path, slots: int, row: tuple[int, int]) -> None:
        """row: views and width of an image's embeddings."""
        self.folder, self.slots, self.row = folder, slots, row
        self._z: int | None = None
        self._sums: int | None = None

    def open(self, write: bool = False) -> None:
        """Opens both files; of a network disk this shows what other machines have written."""
        self._close()
        how = os.O_RDWR if write else os.O_RDONLY
        self._z, self._sums = (os.open(self.folder / name, how) for name in ("z.f16", "sums.u32"))

    def _close(self) -> None:
        for fd in (self._z, self._sums):
            if fd is not None:
                os.close(fd)
        self._z = self._sums = None

    def __del__(self) -> None:
        self._close()

    def rows(self, r: int, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """[n,V,d] float16 of the round, in `out` if it is given."""
        if out is None:
            out = np.empty((len(indices), *self.row), np.float16)
        size, view = self._row_bytes(), out.reshape(-1).view(np.uint8).data
        for k, i in enumerate(indices.tolist()):
            self._read("z.f16", view[k * size : (k + 1) * size], (r * self.slots + i) * size)
        return out

    def sums(self, r: int) -> np.ndarray:
        """[slots] uint32 of the round."""
        found = np.empty(self.slots, np.uint32)
        self._read("sums.u32", found.view(np.uint8).data, r * found.nbytes)
        return found

    def write(self, r: int, indices: np.ndarray, rows: np.ndarray) -> None:
        """Records the rows [n,V,d] of the round and their checksums; `flush` has to follow."""
        assert self._z is not None and self._sums is not None
        size, sums = self._row_bytes(), checksums(rows)
        for i, row, found in zip(indices.tolist(), rows, sums):
            at = r * self.slots + i
            os.pwrite(self._z, row.tobytes(), at * size)
            os.pwrite(self._sums, found.tobytes(), at * 4)

    def flush(self) -> None:
        """Writes to disk what has changed; z first, for a checksum says that its rows are there."""
        assert self._z is not None and self._sums is not None
        with naming(self.folder):
            os.fsync(self._z)
            os.fsync(self._sums)

    def read_ahead(self, r: int) -> None:
        """Has the system read the whole round: random rows would come one by one."""
        assert self._z is not None
        size = self.slots * self._row_bytes()
        # Not every file system takes the advice.
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._z, r * size, size, os.POSIX_FADV_WILLNEED)

    def _row_bytes(self) -> int:
        return 2 * self.row[0] * self.row[1]

    def _read(self, name: str, into: memoryview, at: int) -> None:
        """Fills `into` from the byte `at` of a file on."""
        fd = self._z if name == "z.f16" else self._sums
        assert fd is not None
        got = os.preadv(fd, [into], at)
        # A read of more than 2 GB comes in parts.
        while got < len(into):
            more = os.preadv(fd, [into[got:]], at + got)
            if not more:
                raise UserError(
                    f"{self.folder / name}: cut short while it was read, at byte {at + got}; "
                    f"remove {self.folder} and record anew by {COMMAND}",
                    anywhere=True,
                )
            got += more

    def good(self, r: int, block: int) -> np.ndarray:
        """[slots] bool: whose rows are recorded in the round and agree with their checksums."""
        good, sums = np.zeros(self.slots, bool), self.sums(r)
        for first in range(0, self.slots, block):
            part = slice(first, first + block)
            # Of a block without checksums nothing is read.
            if sums[part].any():
                rows = self.rows(r, np.arange(first, min(first + block, self.slots)))
                good[part] = sums[part] == checksums(rows)
        return good

    def refuse_cut_short(self, rounds: int) -> None:
        """Raises UserError for a file that is shorter than its header says."""
        for name, size in self.sizes(rounds).items():
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
        for name, size in self.sizes(rounds).items():
            with (self.folder / name).open("ab") as f:
                try:
                    # The space is taken now, so that no recording ends at a full disk.
                    os.posix_fallocate(f.fileno(), 0, size)
                except OSError as e:
                    raise UserError(
                        f"{self.folder / name}: {size} bytes cannot be taken there ({e.strerror}); "
                        "make space, take another teacher.cache_folder or lower "
                        "teacher.cache_rounds"
                    ) from None
        write_whole(self.folder / "cache.json", json.dumps(about, indent=1) + "\n")

    def bytes(self, rounds: int) -> int:
        """Bytes of the embeddings of so many rounds."""
        return self.sizes(rounds)["z.f16"]

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

    def sizes(self, rounds: int) -> dict[str, int]:
        """Bytes of the files."""
        images, (views, dim) = rounds * self.slots, self.row
        return {"z.f16": images * views * dim * 2, "sums.u32": images * 4}
