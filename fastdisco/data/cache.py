"""A cache of objects on local disk that the processes of a node share.

FOLDER/ID.tar     an object that is whole: it was renamed to this name after it was checked
FOLDER/ID.part    one that is being fetched, at its full size from the start
FOLDER/ID.lock    held shared by those who use the object; its time is that of the last use
FOLDER/ID.fetch   held by the one who fetches it
FOLDER/room       held by the one who makes room

All locks are flocks: they end with their process, so a kill leaves none."""

import contextlib
import fcntl
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from fastdisco.common.console import say
from fastdisco.common.errors import UserError

PATIENCE = 120.0  # seconds that a process waits until others let objects go


class Wanted(NamedTuple):
    """An object that somebody wants to read."""

    id: str  # of its content: another content has another
    name: str  # for messages
    size: int  # bytes
    fetch: Callable[[Path], None]  # writes it to the file, or raises


class Hold:
    """Objects that nobody removes until `release`, or until the process ends."""

    def __init__(self) -> None:
        self._files: list[int] = []

    def add(self, fd: int) -> None:
        """Takes over an open file whose lock holds an object."""
        self._files.append(fd)

    def release(self) -> None:
        """May be called again."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Remote(Protocol):
    """What a listing needs of tars in object storage; remote.py has it."""

    @property
    def url(self) -> Path:
        """The folder's address."""

    def hold(self, tars: list[str]) -> Hold:
        """Has the tars in the listing's root until the hold is released."""

    def span(self, tars: list[str]) -> int:
        """How many of the tars, in this order, one pipeline takes."""

    def ahead(self, tars: list[str]) -> None:
        """Tells which tars are needed next, in this order."""

    def named(self, error: UserError) -> UserError:
        """The error with the address in place of the root."""


class Cache:
    """Objects in a folder, up to a number of bytes; the least recently used go first."""

    def __init__(self, folder: Path, limit: int) -> None:
        """limit: bytes of all objects, also of those that are being fetched.

        Raises UserError where the folder cannot be made or written."""
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / "room"):
                pass
        except OSError as e:
            raise UserError(
                f"data.cache: {folder} cannot be used ({e.strerror}); give a folder on a local disk"
            ) from None

    def path(self, wanted: Wanted) -> Path:
        """Where the object lies while somebody holds it."""
        return self.folder / f"{wanted.id}.tar"

    def has(self, wanted: Wanted) -> bool:
        """Whether the object is there now.  It may be gone a moment later, unless it is held."""
        try:
            return self.path(wanted).stat().st_size == wanted.size
        except FileNotFoundError:
            return False

    def hold(self, wanted: list[Wanted]) -> Hold:
        """Holds the objects, which are fetched where they are not there.  Where another process
        fetches one, it waits for that.

        Raises UserError where one cannot be fetched, or where there is no room."""
        if (whole := sum(each.size for each in wanted)) > self.limit:
            raise UserError(
                f"data.cache_gb: {_gb(self.limit)} are less than what is read at once, "
                f"{wanted[0].name} and {len(wanted) - 1} more of {_gb(whole)}; raise it"
            )
        hold = Hold()
        try:
            for each in wanted:
                self._take(each, hold, wait=True)
        except BaseException:
            hold.release()
            raise
        return hold

    def fetch_ahead(self, wanted: Wanted) -> bool:
        """Fetches an object that is wanted later, and marks one that is there as used.  Whether it is
        there now: not where another process fetches it, nor where others need the room.

        Raises UserError as `hold` does."""
        with Hold() as hold:
            return self._take(wanted, hold, wait=False)

    def _take(self, wanted: Wanted, hold: Hold, wait: bool) -> bool:
        # Before the look: an object that is there may not go between look and use.
        lock = self.folder / f"{wanted.id}.lock"
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        hold.add(fd)
        fcntl.flock(fd, fcntl.LOCK_SH)
        os.utime(fd)
        return self.has(wanted) or self._fetched(wanted, wait)

    def _fetched(self, wanted: Wanted, wait: bool) -> bool:
        with locked(self.folder / f"{wanted.id}.fetch", wait) as mine:
            if not mine:
                return False
            # Another process may have fetched it meanwhile.
            if self.has(wanted):
                return True
            if not self._reserved(wanted, wait):
                return False
            part = self._part(wanted.id)
            try:
                wanted.fetch(part)
                os.replace(part, self.path(wanted))
            except OSError as e:
                raise UserError(
                    f"{wanted.name}: cannot be written to {self.folder} ({e.strerror}); free space "
                    "there, or lower data.cache_gb",
                    anywhere=True,
                ) from None
            finally:
                part.unlink(missing_ok=True)
        return True

    def _part(self, id: str) -> Path:
        return self.folder / f"{id}.part"

    # ---- room

    def _reserved(self, wanted: Wanted, wait: bool) -> bool:
        """Makes room for the object and takes it by a file of its size."""
        patience = time.monotonic() + PATIENCE * wait
        waited = False
        while True:
            with locked(self.folder / "room"):
                if self._make_room(wanted):
                    # It has no blocks yet, but everybody sees its size.
                    with open(self._part(wanted.id), "wb") as f:
                        os.ftruncate(f.fileno(), wanted.size)
                    return True
            if time.monotonic() >= patience:
                break
            if not waited:
                say(f"{wanted.name}: waits for room in {self.folder}", anywhere=True)
            waited = True
            # Pipelines of this process that are done let theirs go with their memory.
            gc.collect()
            time.sleep(0.2)
        if not wait:
            return False
        raise UserError(
            f"data.cache_gb: {_gb(self.limit)} in {self.folder} are all in use, and {wanted.name} "
            f"needs {_gb(wanted.size)} more; raise it",
            anywhere=True,
        )

    def _make_room(self, wanted: Wanted) -> bool:
        # Left by fetches that were killed; this object's own is ours, as we hold its lock.
        self._part(wanted.id).unlink(missing_ok=True)
        for part in self.folder.glob("*.part"):
            with locked(part.with_suffix(".fetch"), wait=False) as dead:
                if dead:
                    part.unlink(missing_ok=True)
        sizes = {p: _size(p) for kind in ("tar", "part") for p in self.folder.glob(f"*.{kind}")}
        over = sum(sizes.values()) + wanted.size - self.limit
        with contextlib.ExitStack() as locks:
            going = []
            for path in sorted((p for p in sizes if p.suffix == ".tar"), key=_last_use):
                if over <= 0:
                    break
                # Only objects that nobody holds, and nobody can take before they are gone.
                if locks.enter_context(locked(path.with_suffix(".lock"), wait=False)):
                    going.append(path)
                    over -= sizes[path]
            # Where all of them are too few, nothing need go.
            if over <= 0:
                for path in going:
                    path.unlink(missing_ok=True)
        return over <= 0


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock alone; yields whether it does, which it always does with `wait`."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(fd)
        yield False
        return
    try:
        yield True
    finally:
        os.close(fd)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _last_use(path: Path) -> float:
    try:
        return path.with_suffix(".lock").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
