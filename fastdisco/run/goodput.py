"""Goodput: the share of a supervised training's time that went into steps that count."""

import json
import time
from pathlib import Path

from fastdisco.common.console import say
from fastdisco.common.files import read_regular, told


def saved(folder: Path) -> int:
    """The step of the checkpoint that a run goes on from; 0 where there is none."""
    try:
        name = read_regular(folder / "checkpoints/last").decode(errors="replace")
        return int(name.strip().removeprefix("step_"))
    except (OSError, ValueError):
        return 0


def seconds(path: Path, start: int, end: int) -> float:
    """The time that the steps after `start` up to `end` took, by the metrics.jsonl of a run."""
    last, found = start, 0.0
    for line in read_regular(path).decode(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            step, took = int(entry["step"]), float(entry["perf/step_time"])
        # A torn line, or an evaluation's; or one that is nested by the thousand.
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        if last < step <= end:
            found += (step - last) * took
            last = step
    return found


def count(folder: Path, began: float, start: int, restarts: int) -> None:
    """Writes perf/goodput into the run's metrics.jsonl, and says it.

    began  time.time() of the first start, after which the training went on from step `start`"""
    step, wall = saved(folder), time.time() - began
    path = folder / "metrics.jsonl"
    # A training that has a lock writes there itself.
    if step <= start or (folder / ".lock").exists() or not path.exists():
        return
    try:
        useful = seconds(path, start, step)
        entry = {"step": step, "time": round(time.time(), 3), "perf/goodput": useful / wall}
        with path.open("a") as f:
            f.write(json.dumps(entry) + "\n")
    except OSError as e:
        say(f"goodput is not written: {told(e)}")
        return
    say(
        f"goodput {useful / wall:.1%}: {useful:.0f} s of {wall:.0f} s since the first start were "
        f"steps that count ({restarts} restart{'s' * (restarts != 1)})"
    )
