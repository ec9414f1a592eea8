"""A thread on each rank that ends a run which gets no further, and says which rank waits for what.

Each rank keeps a heartbeat in the run's folder, RUN/.heartbeats/rank_N: one line of JSON, written by
this thread once a second, never by the training's.  Where ranks wait for each other, the one to look
at is the one that is not in `exchange`.

What hangs may be the file server: files are written and read by threads that nobody waits for longer
than a few seconds."""

import contextlib
import faulthandler
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from pydantic import TypeAdapter

from fastdisco.common import attempt, dist, launch
from fastdisco.common.console import shorten
from fastdisco.common.heart import enter, heart

NAME = ".heartbeats"
# Start-up (with the first step, which compiles), saves and evaluations may be silent for so many
# times run.stall_seconds.
LONG = 4
# Seconds between two looks; that a file system may take to answer; after which a rank whose heartbeat
# has stopped counts as halted.
_LOOK, _ANSWERS, _SIGN = 1.0, 5.0, 10.0
# Where a thread's innermost Python frame is while it waits for other ranks.
_EXCHANGES = (
    "/torch/distributed/",
    "/deepspeed/comm/",
    "/deepspeed/runtime/",
    "/fastdisco/common/dist.py",
    "/fastdisco/engine/exchange.py",
)
# The same of the thread that writes a checkpoint beside the training.
_OF_SAVES = "/fastdisco/common/store.py"
# The padded size of a heartbeat: a shorter line would leave the end of a longer one.
_BYTES = 400


class Beat(NamedTuple):
    """What a rank's heartbeat says."""

    rank: int
    host: str
    pid: int
    # -1 before the first.
    step: int
    phase: str
    # Seconds without progress.
    silent: float
    # Whether its watchdog has ended it.
    ended: bool
    # Seconds since it was written, by the file server's clock.
    age: float = 0.0


# A field of another type would end the watchdog's thread only later, where it is looked at.
_FORM = TypeAdapter(Beat)


class Watchdog:
    """Watches this process from the start of its context to the end."""

    def __init__(self, stall: float | None) -> None:
        """stall: seconds without progress after which the run ends; None: it never does."""
        self.stall = stall
        self.closing: list[Callable[[], Any]] = []
        self._folder: Path | None = None
        self._stepped = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._files = _Bounded()

    @property
    def longest(self) -> float | None:
        """Seconds after which the run ends in any phase; None: never."""
        return self.stall and self.stall * LONG

    def __enter__(self) -> "Watchdog":
        enter("start")
        if self.stall:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()

    @contextlib.contextmanager
    def following(self, folder: Path, closing: list[Callable[[], Any]]) -> Iterator[None]:
        """In this context the rank has a heartbeat in the run's folder.

        closing  what is called before this process is ended, the latest first
        Where an exchange fails because another rank's watchdog has ended that rank, this process
        ends likewise, without a traceback."""
        self.closing = closing
        closing.append(self.leave)
        if self.stall:
            self._folder = folder / NAME
            self._files.run(lambda: self._write(0.0, False))
        try:
            yield
        # What torch raises where a connection breaks.
        except RuntimeError:
            if any(other and other.ended for other in self._others()):
                self._end(f"rank {dist.rank()}: ends, as another rank had to; {_AGAIN}")
            raise
        finally:
            self.leave()

    def step(self, number: int) -> None:
        """The training's step, from 0 on, begins: it waits for data first."""
        enter("data", number)
        attempt.at(number)

    def done(self) -> None:
        """The step is done."""
        self._stepped = True

    def leave(self) -> None:
        """Removes this rank's heartbeat; of the last one, the folder."""
        folder, self._folder = self._folder, None
        if folder:
            with contextlib.suppress(OSError):
                _path(folder, dist.rank()).unlink(missing_ok=True)
                folder.rmdir()

    # ---- the thread

    def _watch(self) -> None:
        silent, beats, before = 0.0, heart.beats, time.monotonic()
        look = min(_LOOK, (self.stall or 0) / 4)
        while not self._over.wait(look):
            now = time.monotonic()
            # While the process was halted, it was not the training that did nothing.
            silent += min(now - before, 2 * look)
            before = now
            if heart.beats != beats:
                silent, beats = 0.0, heart.beats
            self._files.run(lambda silent=silent: self._write(silent, False))
            if silent >= self._limit() and not self._over.is_set():
                self._stalled(silent)

    def _limit(self) -> float:
        assert self.stall
        long = not self._stepped or heart.phase in ("start", "save", "evaluate")
        return self.stall * (LONG if long else 1)

    def _stalled(self, silent: float) -> NoReturn:
        self._files.run(lambda: self._write(silent, True))
        me, others = self._beat(silent, True), self._others()
        sign = min(_SIGN, silent / 2)
        guilty = _guilty(others, sign)
        # Where another rank is to blame, this one's stack tells nothing.
        if not guilty or me.phase != "exchange":
            faulthandler.dump_traceback(2, all_threads=True)
        readable = self._folder is None or not self._files.busy
        self._end(sentence(me, others, readable, sign), f" (run.stall_seconds: {self.stall:g})")

    def _end(self, text: str, more: str = "") -> NoReturn:
        # Not print: the training's thread may hold what print needs.
        os.write(2, f"fastdisco: error: {text}{more}\n".encode(errors="replace"))
        # The heartbeat stays: it tells the others.
        self._folder = None
        for close in reversed(self.closing):
            _Bounded().run(close)
        attempt.why(attempt.STALLED)
        attempt.ended(launch.STOPPED)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(launch.STOPPED)

    # ---- heartbeats

    def _beat(self, silent: float, ended: bool) -> Beat:
        host, step = platform.node(), -1 if heart.phase == "start" else heart.step
        return Beat(dist.rank(), host, os.getpid(), step, _phase(), round(silent, 1), ended)

    def _write(self, silent: float, ended: bool) -> None:
        folder = self._folder
        # A run's folder that is gone stays gone.
        if folder is None or not folder.parent.exists():
            return
        folder.mkdir(exist_ok=True)
        beat = json.dumps(self._beat(silent, ended)[:-1]).ljust(_BYTES - 1) + "\n"
        fd = os.open(_path(folder, dist.rank()), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(fd, beat.encode(), 0)
        finally:
            os.close(fd)

    def _others(self) -> list[Beat | None]:
        """The heartbeats of the other ranks; None of one that cannot be read."""
        folder, found = self._folder, list[Beat | None]()
        if folder:
            self._files.run(lambda: found.extend(others(folder)))
        return found or [None] * (dist.world() - 1)


class _Bounded:
    """Runs what may hang in threads of its own, one at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        # Held while a thread is started: the watchdog's thread asks, and the training's.
        self._starting = threading.Lock()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def run(self, action: Callable[[], Any]) -> None:
        """Waits some seconds at most.  Does nothing where the last action has not come back."""

        def quietly() -> None:
            # A full disk, for example: the training has its own sentences for it.
            with contextlib.suppress(Exception):
                action()

        thread = threading.Thread(target=quietly, daemon=True, name="watchdog's files")
        with self._starting:
            if self.busy:
                return
            thread.start()
            self._thread = thread
        thread.join(_ANSWERS)


def forget(folder: Path) -> None:
    """Removes the heartbeats of an earlier attempt.  Call it before any rank follows."""
    shutil.rmtree(folder / NAME, ignore_errors=True)


# ---- what is known of the ranks

_AGAIN = "the same command goes on from the last checkpoint"


def others(folder: Path) -> list[Beat | None]:
    """The heartbeats of all ranks but this one, in rank order; None of one that cannot be read."""
    now = _time(_path(folder, dist.rank()))
    return [_read(folder, r, now) for r in range(dist.world()) if r != dist.rank()]


def sentence(
    me: Beat, others: list[Beat | None], readable: bool = True, sign: float = _SIGN
) -> str:
    """What the rank `me` does or waits for.

    readable: whether the folder of the heartbeats has answered;  sign: see _guilty."""
    said = f"rank {me.rank} on {me.host}: no progress for {me.silent:.0f} s in {_doing(me)}"
    guilty = _guilty(others, sign)
    if not readable:
        said += ", and the run's folder does not answer"
    elif me.phase == "exchange" and guilty:
        said += f", which waits for {shorten(guilty, 3)}"
    elif me.phase == "exchange" and others:
        said += (
            ", as are all ranks: the network between them is cut, or a device hangs; look at the "
            "links and the drivers"
        )
    return f"{said}; {_AGAIN}"


def _guilty(others: list[Beat | None], sign: float) -> list[str]:
    """The ranks that others wait for, and what they do.

    sign: age in seconds of a heartbeat whose rank counts as halted"""
    found = []
    for other in others:
        if other is None:
            found.append("a rank without a heartbeat")
        elif other.age > sign and not other.ended:
            found.append(
                f"rank {other.rank} on {other.host} (process {other.pid}), which has given no sign "
                f"for {other.age:.0f} s: it is halted or dead, or its host is cut off"
            )
        elif other.phase != "exchange":
            found.append(
                f"rank {other.rank} on {other.host} (process {other.pid}), which has been in "
                f"{_doing(other)} for {other.silent:.0f} s"
            )
    return found


def _doing(beat: Beat) -> str:
    if beat.phase == "start":
        return "start-up"
    return f"{beat.phase} {'in start-up' if beat.step < 0 else f'of step {beat.step + 1}'}"


def _read(folder: Path, rank: int, now: float) -> Beat | None:
    path = _path(folder, rank)
    try:
        written = _time(path)
        beat = _FORM.validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError):
        return None
    return beat._replace(age=max(0.0, now - written))


def _time(path: Path) -> float:
    """Time of modification.  Opened first: on NFS, that asks the server anew."""
    with path.open() as f:
        return os.fstat(f.fileno()).st_mtime


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}"


def _phase() -> str:
    """The training's phase; `exchange` where a thread waits for other ranks, wherever that is."""
    # Only a training that saves waits for what that thread waits for.
    places = (*_EXCHANGES, _OF_SAVES) if heart.phase == "save" else _EXCHANGES
    waits = any(_is_in(frame, places) for frame in sys._current_frames().values())
    return "exchange" if waits else heart.phase


def _is_in(innermost: FrameType, places: tuple[str, ...]) -> bool:
    return any(part in innermost.f_code.co_filename for part in places)
