"""The processes of an attempt: who they are, whether they live, and what they have said."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import signals
from harness import ROOT

from soaking import shim


class Attempt:
    """Processes that train in a run's folder.

    log      what they have said;  ranks: their processes' numbers, by rank
    top      the launcher, or the rank itself where there is none
    controls of the ranks' libraries; none of a real launcher's"""

    def __init__(self, top: int, log: Path, controls: Sequence[shim.Control] = ()) -> None:
        self.top, self.log, self.controls = top, log, controls
        self.ranks: list[int] = []
        self.began = time.monotonic()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def end(self) -> str:
        return last_lines(self.text)

    def tree(self) -> list[int]:
        """All that live: the launcher, what is below it, and the ranks that have outlived it."""
        found = [self.top, *signals.below(self.top), *self.ranks]
        return [pid for pid in dict.fromkeys(found) if signals.alive(pid)]

    def over(self) -> bool:
        reap()
        return not self.tree()

    def find_ranks(self, count: int) -> bool:
        """Looks for the ranks' processes below the launcher, if they have started."""
        found = {}
        for pid in [self.top, *signals.below(self.top)]:
            rank = _rank(pid)
            # A rank's own children have its variables, too.
            if rank is not None and signals.alive(pid):
                found.setdefault(rank, pid)
        if len(found) == count:
            self.ranks = [found[r] for r in sorted(found)]
        return len(found) == count

    def kill(self) -> None:
        """Ends everything at once."""
        for pid in self.tree():
            send(pid, signal.SIGKILL)
        end = time.monotonic() + 20
        while not self.over() and time.monotonic() < end:
            time.sleep(0.01)


def last_lines(text: str) -> str:
    """What a record's note keeps: no C++ frames of torch's warnings, and no folders of this machine."""
    lines = [x for x in text.splitlines() if not x.startswith(("frame #", "<omitting"))]
    kept = "\n".join(lines[-40:])
    for folder, name in ((sys.prefix, "VENV"), (str(ROOT), "ROOT")):
        kept = kept.replace(folder, name)
    return kept


def send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def reap() -> None:
    """Takes away children that have ended: ranks come here when their launcher is killed."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _rank(pid: int) -> int | None:
    """The rank that a process is; a forked one has it in its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        if words[0] == "rank":
            return int(words[1])
        for line in signals.environment(pid).split("\0"):
            if line.startswith("RANK="):
                return int(line[5:])
    except (OSError, ValueError):
        pass
    return None
