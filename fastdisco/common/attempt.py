"""What a supervised process tells its supervisor (commands/supervise.py): its number, the step under
way and its exit code, since launchers turn codes into others of their own.

The supervisor names a folder of this machine in FASTDISCO_ATTEMPT, and each rank keeps a line in a
file of its own there.  Without the variable nothing happens."""

import contextlib
import functools
import os
from pathlib import Path
from typing import NamedTuple

from fastdisco.common import launch

FOLDER = "FASTDISCO_ATTEMPT"


class Told(NamedTuple):
    """pid and start name the process (`launch.process`)."""

    pid: int
    start: int
    # The step under way; -1 before the first.
    step: int
    # The exit code; -1 where the process has told none.
    code: int


def at(step: int) -> None:
    """The step under way.  One system call."""
    _write(step, -1)


def ended(code: int) -> None:
    """The code that this process is about to end with."""
    _write(_last[0], code)


def read(folder: Path) -> list[Told]:
    """What the ranks have told, in the order of their numbers."""
    found = []
    for path in sorted(folder.glob("rank_*"), key=lambda p: int(p.name[5:])):
        numbers = path.read_text().split()
        # Not yet written.
        if len(numbers) == len(Told._fields):
            found.append(Told(*map(int, numbers)))
    return found


# The step of the last line.
_last = [-1]


def _write(step: int, code: int) -> None:
    file = _file()
    if file is None:
        return
    _last[0] = step
    fd, me = file
    # Of one length: a shorter line would leave the end of a longer one.
    line = f"{me} {step} {code}".ljust(79) + "\n"
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
