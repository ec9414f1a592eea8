"""SIGTERM and Ctrl-C: the loop stops after the step under way."""

import signal
from types import FrameType


class Stop:
    """`asked` turns true at SIGTERM or at the first Ctrl-C; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
