"""SIGTERM, SIGUSR1 and Ctrl-C: all ranks save and stop after the next step."""

import signal
from collections.abc import Callable
from types import FrameType

from fastdisco.common import attempt, dist, launch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """`asked` turns true at SIGTERM, at SIGUSR1 (with which Slurm warns of a job's end) or at the
    first Ctrl-C; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._told: Callable[[], bool] = lambda: False
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def agreed(self) -> bool:
        """Whether any rank has been asked; the same on every rank.  Call it once a step.

        With several ranks the answer is that of the call before, so that nobody waits for a rank
        that is slower by less than a step, and nobody for a device."""
        if dist.world() == 1:
            return self.asked
        before, self._told = self._told, dist.any_rank_later(self.asked)
        return before()

    def finish(self) -> None:
        """Waits for what is under way between the ranks."""
        self._told()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        # A rank that has lost its launcher gets SIGTERM, too.
        if not launch.orphaned():
            attempt.why(attempt.ASKED)
