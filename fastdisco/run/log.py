"""Where a run's metrics go: metrics.jsonl, the loggers, and moving lines on a terminal or plain ones
elsewhere; rank 0 only."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.live import Live

from fastdisco.common import dist
from fastdisco.common.console import console, say
from fastdisco.common.files import naming, read_regular, write_whole
from fastdisco.run.appended import Appended
from fastdisco.run.loggers import Logger
from fastdisco.run.progress import Bar, Scores, evaluated, plain


class Log:
    """Writes metrics; a context manager that owns the bar."""

    def __init__(
        self, folder: Path, start: int, steps: int, loggers: Sequence[Logger] = ()
    ) -> None:
        """folder: the run's.  start: the step a resumed run continues at; entries that an earlier
        attempt wrote after it are dropped.  loggers: who gets every metric, too, and is closed with
        this."""
        self.steps, self.loggers = steps, loggers
        self.scores = Scores()
        # Steps at which earlier attempts evaluated.
        self.scored: set[int] = set()
        self.file: Appended | None = None
        self.live: Live | None = None
        if dist.rank():
            return
        path = folder / "metrics.jsonl"
        kept = _entries(path, start)
        for line in kept:
            entry = json.loads(line)
            self.scores.add(entry)
            if any(name.startswith("eval/") for name in entry):
                self.scored.add(entry["step"])
        content = "".join(kept)
        write_whole(path, content)
        self.file = Appended(path, len(content.encode()))
        if console.is_terminal:
            self.bar = Bar(start, steps, self.scores)
            # What is said appears above it.
            self.live = Live(self.bar, console=console, refresh_per_second=2)

    def __enter__(self) -> "Log":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self.live:
            self.live.stop()
        if self.file:
            self.file.close()
        for logger in self.loggers:
            logger.close()

    def lacks(self, step: int) -> bool:
        """Whether a resumed run has no evaluation of that step; False on ranks other than 0."""
        return self.file is not None and step not in self.scored

    def write(self, step: int, values: dict[str, float]) -> None:
        """Metrics after `step` steps, named group/name as in TensorBoard."""
        if not self.file or not values:
            return
        entry = {"step": step, "time": round(time.time(), 3), **values}
        self.file.add((json.dumps(entry) + "\n").encode())
        for logger in self.loggers:
            logger.write(step, values)
        self.scores.add(values)
        if any(name.startswith("eval/") for name in values):
            for line in evaluated(step, self.steps, values, self.scores):
                say(line)
        elif "train/epoch" not in values:
            return
        elif self.live:
            self.bar.step, self.bar.values = step, values
        else:
            say(plain(step, self.steps, values, self.scores))


def _entries(path: Path, start: int) -> list[str]:
    """The lines of a metrics.jsonl up to that step, without those that are no entries, which is
    said."""
    if not start or not path.exists():
        return []
    kept, torn = [], 0
    with naming(path):
        lines = read_regular(path).decode(errors="replace").splitlines()
    for line in lines:
        step = _step(line)
        if step is None:
            # A full disk or a power loss has cut it.
            torn += 1
        elif step <= start:
            kept.append(line + "\n")
    if torn:
        say(
            f"{path}: {torn} damaged line{'s' * (torn > 1)} dropped, of steps that are trained anyhow"
        )
    return kept


def _step(line: str) -> int | None:
    """The step of an entry; None where the line is none."""
    try:
        entry = json.loads(line)
    # RecursionError: brackets in brackets, by the thousand.
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return None
    numbers = (v for k, v in entry.items() if k.endswith("/knn_top1"))
    return entry["step"] if all(isinstance(v, float) for v in numbers) else None
