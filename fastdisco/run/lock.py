"""One training at a time in a run's folder.

RUN/.lock is JSON: who trains here (host, process, start, boot).  Its time of modification is the
heartbeat: a thread renews it every BEAT seconds.  All that it needs of a file system are hard links
or exclusive creation, and times; locks of the kernel's are not the same on every network file
system.

A lock is stale, and is taken over, where its process is dead.  On this machine, outside other
containers, the kernel tells.  For another host the heartbeat does: none for DEAD seconds by the file
server's own clock, so that no clock of a host matters."""

import contextlib
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

from fastdisco.common import temporary
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.common.files import open_regular, read_json, read_regular
from fastdisco.common.launch import process

BEAT, DEAD = 10.0, 60.0
NAME = ".lock"


class Lock:
    """A run's lock, not yet taken; a context manager that gives it back."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._made = False
        self.lost = ""
        self._me: dict[str, Any] = {}
        self._ended = threading.Event()
        # Held while the file is renewed or given back: no heartbeat may bring it back afterwards.
        self._writing = threading.Lock()

    def take(self, folder: Path) -> str:
        """Takes the folder's lock, making the folder where there is none; returns the lock's id.

        Waits up to DEAD seconds where the lock is of another host that may have died just now.
        Raises UserError where somebody trains there, or where the folder cannot be written to."""
        path = folder / NAME
        self._me = _me()
        try:
            self._made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            while not _create(path, _text(self._me)):
                _remove_stale(path)
        except OSError as e:
            raise UserError(
                f"{folder}: the run's folder cannot be written to ({e.strerror}); make it writable or "
                "take another run.out"
            ) from None
        self.path = path
        threading.Thread(target=self._beat, daemon=True, name="lock").start()
        return self._me["id"]

    def check(self) -> None:
        """Raises UserError where another training has taken the lock over, which happens when this
        process was halted for longer than DEAD seconds.  Reads the file: the heartbeat may come
        later.  Only rank 0 can find out."""
        if self.path:
            self._look(self.path)
        if self.lost:
            raise UserError(
                f"{self.lost} in the meantime, because this one gave no sign for a minute; it goes "
                "on there, and this one ends without saving",
                anywhere=True,
            )

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        self._ended.set()
        with self._writing:
            path, self.path = self.path, None
            if path and not self.lost and read(path).get("id") == self._me["id"]:
                path.unlink(missing_ok=True)
                if self._made:
                    # A run that was refused leaves nothing.
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def _beat(self) -> None:
        path = self.path
        assert path
        while not self._ended.wait(BEAT) and not self.lost:
            # A file server that does not answer now may do so at the next beat.
            with self._writing, contextlib.suppress(OSError):
                self._renew(path)

    def _renew(self, path: Path) -> None:
        self._look(path)
        if self._ended.is_set() or self.lost:
            return
        # Somebody may have deleted it by hand: then it comes back.
        if path.exists() or (path.parent.exists() and not _create(path, _text(self._me))):
            os.utime(path)

    def _look(self, path: Path) -> None:
        """Sets `lost` where the lock is another training's."""
        found = read(path)
        if found and found.get("id") != self._me["id"]:
            self.lost = f"{path.parent}: {_told(found)}"


def read(path: Path) -> dict[str, Any]:
    """What a lock says; empty where there is none, or where it is torn."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def lives(owner: dict[str, Any]) -> bool | None:
    """Whether a lock's process lives, where this machine can tell; None of another's."""
    machine = temporary.machine()
    pid = owner.get("pid")
    if not machine or owner.get("machine") != machine or type(pid) is not int:
        return None
    seen = process(pid)
    return bool(seen) and seen[0] == owner.get("ticks")


def _me() -> dict[str, Any]:
    seen = process(os.getpid())
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "ticks": seen and seen[0],
        "machine": temporary.machine(),
        "id": os.urandom(8).hex(),
    }


def _text(owner: dict[str, Any]) -> str:
    return json.dumps(owner) + "\n"


def _create(path: Path, text: str) -> bool:
    """Makes the lock with its content; False where there is one."""
    part = temporary.part(path)
    try:
        part.write_text(text)
        try:
            # Never replaces a file, and the lock is never seen half written.
            os.link(part, path)
        except FileExistsError:
            return False
        except OSError:
            # A file system without hard links.
            try:
                with path.open("x") as f:
                    f.write(text)
            except FileExistsError:
                return False
        return True
    finally:
        part.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Takes a dead training's lock away; raises UserError where it is alive."""
    try:
        before = _time(path)
    except FileNotFoundError:
        return
    owner = read(path)
    if _alive(path, owner, before):
        raise UserError(
            f"{path.parent}: {_told(owner)}; wait for it or end it, or take another run.name"
        )
    # Two may find the same lock stale: only one of them gets it under the new name.
    aside = temporary.part(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if read(aside) != owner:
        # The other was quicker, and this is its new lock.
        _create(path, read_regular(aside).decode(errors="replace"))
        aside.unlink()
        return
    aside.unlink()
    known = all(key in owner for key in ("pid", "host", "since"))
    who = f"process {owner['pid']} on {owner['host']}, {owner['since']}" if known else "unreadable"
    say(f"{path.parent}: took over the lock of a training that was killed ({who})")


def _alive(path: Path, owner: dict[str, Any], before: float) -> bool:
    here = lives(owner)
    if here is not None:
        return here
    said = False
    while (age := _now(path.parent) - before) < DEAD:
        if not said:
            said = True
            host = owner.get("host", "an unknown host")
            say(
                f"{path.parent}: {host} has the lock; waiting for a sign of life, {DEAD - age:.0f} s "
                "at most"
            )
        time.sleep(min(1.0, DEAD / 10))
        try:
            if _time(path) != before:
                return True
        except FileNotFoundError:
            return False
    return False


def _time(path: Path) -> float:
    """Time of modification.  Opened first: on NFS, that asks the server anew."""
    with open_regular(path) as f:
        return os.fstat(f.fileno()).st_mtime


def _now(folder: Path) -> float:
    """The time of the clock that dates the folder's files."""
    part = temporary.part(folder / NAME)
    try:
        part.touch()
        return _time(part)
    finally:
        part.unlink(missing_ok=True)


def _told(owner: dict[str, Any]) -> str:
    if not owner:
        return "another training holds the lock"
    return (
        f"process {owner.get('pid')} on {owner.get('host')} has been training there since "
        f"{owner.get('since')}"
    )
