"""What a supervised process tells its supervisor (run/supervisor.py): its number, the step under way,
its exit code, since launchers turn codes into others of their own, and why it stops.

The supervisor names a folder of this machine in FASTDISCO_ATTEMPT, and each rank keeps a line in a
file of its own there.  Without the variable nothing happens."""

import contextlib
import functools
import os
from pathlib import Path
from typing import NamedTuple

from fastdisco.common import launch

FOLDER = "FASTDISCO_ATTEMPT"
# Why a process stops: a signal asked it to; the watchdog saw no progress.
ASKED, STALLED = 1, 2


class Told(NamedTuple):
    """pid and start name the process (`launch.process`)."""

    pid: int
    start: int
    # The step under way; -1 before the first.
    step: int
    # The exit code; -1 where the process has told none.
    code: int
    # ASKED or STALLED; 0 where there was no reason to stop.
    why: int


def at(step: int) -> None:
    """The step under way.  One system call."""
    _last["step"] = step
    _write()


def why(reason: int) -> None:
    """Why this process stops: ASKED or STALLED, which outweighs it."""
    _last["why"] = max(_last["why"], reason)
    _write()


def ended(code: int) -> None:
    """The code that this process is about to end with."""
    _last["code"] = code
    _write()


def read(folder: Path) -> list[Told]:
    """What the ranks have told, in the order of their numbers."""
    found = []
    for path in sorted(folder.glob("rank_*"), key=lambda p: int(p.name[5:])):
        numbers = path.read_text().split()
        # Not yet written.
        if len(numbers) == len(Told._fields):
            found.append(Told(*map(int, numbers)))
    return found


# Of the last line.
_last = dict(step=-1, code=-1, why=0)


def _write() -> None:
    file = _file()
    if file is None:
        return
    fd, me = file
    # Of one length: a shorter line would leave the end of a longer one.
    line = f"{me} {_last['step']} {_last['code']} {_last['why']}".ljust(79) + "\n"
    # A full disk of temporary files does not end a training.
    with contextlib.suppress(OSError):
        os.pwrite(fd, line.encode(), 0)


@functools.cache
def _file() -> tuple[int, str] | None:
    folder = os.environ.get("FASTDISCO_ATTEMPT")
    if not folder:
        return None
    path = os.path.join(folder, f"rank_{launch.rank()}")
    seen = launch.process(os.getpid())
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    return fd, f"{os.getpid()} {seen[0] if seen else 0}"
