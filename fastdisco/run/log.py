"""Where a run's metrics go: metrics.jsonl, TensorBoard, and a progress bar on a terminal or plain
lines elsewhere; rank 0 only."""

import json
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastdisco.common import dist
from fastdisco.common.console import console, say
from fastdisco.common.files import naming, write_whole
from fastdisco.run.appended import Appended
from fastdisco.run.board import Board


class Log:
    """Writes metrics; a context manager that owns the bar."""

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        """folder: the run's.  start: the step a resumed run continues at; entries that an earlier
        attempt wrote after it are dropped."""
        self.steps = steps
        # The best kNN accuracy so far, by its name.
        self.best: dict[str, float] = {}
        # Steps at which earlier attempts evaluated.
        self.scored: set[int] = set()
        self.file: Appended | None = None
        self.bar: Progress | None = None
        if dist.rank():
            return
        self.board = Board(folder / "tb", start)
        path = folder / "metrics.jsonl"
        kept = _entries(path, start)
        for line in kept:
            entry = json.loads(line)
            if self._remember(entry):
                self.scored.add(entry["step"])
        content = "".join(kept)
        write_whole(path, content)
        self.file = Appended(path, len(content.encode()))
        if console.is_terminal:
            self.bar, self.task = _bar(start, steps)

    def __enter__(self) -> "Log":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self.bar:
            self.bar.stop()
        if self.file:
            self.file.close()
            self.board.close()

    def lacks(self, step: int) -> bool:
        """Whether a resumed run has no evaluation of that step; False on ranks other than 0."""
        return self.file is not None and step not in self.scored

    def write(self, step: int, values: dict[str, float]) -> None:
        """Metrics after `step` steps, named group/name as in TensorBoard."""
        if not self.file or not values:
            return
        entry = {"step": step, "time": round(time.time(), 3), **values}
        self.file.add((json.dumps(entry) + "\n").encode())
        self.board.write(step, values)
        self._remember(values)
        if any(name.startswith("eval/") for name in values):
            self._show_evaluation(step, values)
        elif "train/epoch" in values:
            self._show_step(step, values)

    def _remember(self, values: dict[str, float]) -> None:
        """`best` now knows the kNN accuracies among the values."""
        scores = {k: v for k, v in values.items() if k.endswith("/knn_top1")}
        self.best |= {k: max(v, self.best.get(k, 0.0)) for k, v in scores.items()}

    def _show_evaluation(self, step: int, values: dict[str, float]) -> None:
        """A line for each student."""
        for group in dict.fromkeys(name.rpartition("/")[0] for name in values):
            own = {
                k.rpartition("/")[2]: v for k, v in values.items() if k.rpartition("/")[0] == group
            }
            parts = []
            if "knn_top1" in own:
                best = self.best[f"{group}/knn_top1"]
                parts.append(f"kNN top-1 {own['knn_top1']:.2%}  best {best:.2%}")
            if "effective_rank" in own:
                parts.append(f"effective rank {own['effective_rank']:.1f}")
            if "teacher_neighbours" in own:
                parts.append(f"neighbours shared with the teacher {own['teacher_neighbours']:.1%}")
            student = _student(f"{group}/")
            say(f"step {step}/{self.steps}  {student}{'  '.join(parts)}")

    def _show_step(self, step: int, values: dict[str, float]) -> None:
        line = self._line(values)
        if self.bar:
            self.bar.update(self.task, completed=step, description=line)
        else:
            epoch, eta = values["train/epoch"], _hms(values["perf/eta"])
            say(f"step {step}/{self.steps}  epoch {epoch:.2f}  {line}  ETA {eta}")

    def _line(self, values: dict[str, float]) -> str:
        """Losses, learning rate, speed and best accuracy.  Of several students it has the sums of
        the losses alone, for the line would be too long."""
        several = "train/loss" not in values
        shown = {
            k.removeprefix("train/"): v
            for k, v in values.items()
            if (k.endswith("/loss") if several else k.startswith("train/loss"))
        }
        losses = "  ".join(f"{name} {loss:.4g}" for name, loss in shown.items())
        rate = "" if several else f"  lr {values['train/lr']:.3g}"
        speed, wait = values["perf/total_ips"], values["perf/data_share"]
        best = "".join(f"  {_student(name)}kNN {x:.1%}" for name, x in self.best.items())
        return f"{losses}{rate}  {speed:.0f} images/s  data wait {wait:.0%}{best}"


def _entries(path: Path, start: int) -> list[str]:
    """The lines of a metrics.jsonl up to that step, without those that are no entries, which is
    said."""
    if not start or not path.exists():
        return []
    kept, torn = [], 0
    with naming(path):
        lines = path.read_text(errors="replace").splitlines()
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


def _bar(start: int, steps: int) -> tuple[Progress, TaskID]:
    bar = Progress(
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
    )
    return bar, bar.add_task("", total=steps, completed=start)


def _student(name: str) -> str:
    """eval/<student>/knn_top1 -> '<student> '; eval/knn_top1 -> ''"""
    return "".join(f"{part} " for part in name.split("/")[1:-1])


def _hms(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"
