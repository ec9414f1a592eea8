"""The heart of this process: what it does at the moment, and that it gets on with it.

Whatever works for long calls `beat`; a training's watchdog (run/watchdog.py) looks whether anybody
does.  A beat costs nothing."""

import threading


class Heart:
    """phase  what the process does: start, data, forward, exchange, save or evaluate
    step   the training step under way, from 0 on;  beats: grows with all progress"""

    def __init__(self) -> None:
        self.phase, self.step, self.beats = "start", 0, 0


heart = Heart()


def beat() -> None:
    """Something has been done since the last beat.

    It counts from the main thread alone: that another one fetches ahead is not the training's
    progress."""
    if threading.current_thread() is threading.main_thread():
        heart.beats += 1


def enter(phase: str, step: int | None = None) -> None:
    """The process begins something else, which is progress, too."""
    heart.phase = phase
    heart.step = heart.step if step is None else step
    heart.beats += 1
