"""What a run's folder tells from outside, while it trains or afterwards: reads alone, and no torch.

Nothing is written into the folder, and its lock is looked at and never taken."""

import errno
import json
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from fastdisco.common.errors import UserError
from fastdisco.run import lock
from fastdisco.run.progress import Scores

RUNNING, STOPPED, FINISHED, CRASHED = "running", "stopped", "finished", "crashed"
MALFORMED = "malformed"
# One of these tells a run's folder, damaged or not.
_MARKS = ("config.yaml", "metrics.jsonl", "checkpoints", lock.NAME)
# How deep below the folder that is listed a run may lie.
_DEPTH = 3


@dataclass
class Seen:
    """A run as it is now."""

    folder: Path
    state: str = MALFORMED
    # Why it is malformed, or what else is to be said.
    note: str = ""
    step: int = 0
    # Of the whole training; None before the first log point.
    steps: int | None = None
    # Seconds to go, of a run that trains.
    eta: float | None = None
    # Seconds since its newest log point, or since its start.
    age: float | None = None
    # The newest values of the log, group/name.
    values: dict[str, float] = field(default_factory=dict)
    scores: Scores = field(default_factory=Scores)
    # (step, accuracy) of each evaluation, by the student's name; '' where there is one.
    knn: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def find(folder: Path) -> list[Path]:
    """The folders of runs in the folder, or the folder itself where it is one, by name.

    Raises UserError where there is no such folder."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {found}; give the folder that holds runs, such as out")
    return sorted(_below(folder, _DEPTH))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if any(os.path.lexists(folder / name) for name in _MARKS):
        yield folder
    elif depth:
        try:
            inside = [p for p in folder.iterdir() if p.is_dir() and not p.is_symlink()]
        # One that may not be read holds no run that anybody could list.
        except OSError:
            return
        for path in inside:
            yield from _below(path, depth - 1)


def look(folder: Path) -> Seen:
    """The run in the folder; whatever is wrong with its files is said in its `note`."""
    seen = Seen(folder)
    alive, owner = _lock(folder / lock.NAME)
    problem = _configuration(folder / "config.yaml")
    if problem and not alive:
        # A training writes it after its first look at data and teacher.
        seen.note = problem
        return seen
    saved, note = _saved(folder)
    try:
        times = _metrics(folder / "metrics.jsonl", seen)
    except UserError as e:
        seen.note = str(e)
        return seen
    seen.note = seen.note or note
    seen.age = None if times is None else max(time.time() - times, 0.0)
    if alive:
        seen.state = RUNNING
        if seen.eta is not None and seen.age is not None:
            seen.eta = max(seen.eta - seen.age, 0.0)
        return seen
    finished = seen.steps is not None and saved is not None and saved >= seen.steps
    seen.state = FINISHED if finished else _ended(seen.step, saved, owner)
    seen.eta = None
    return seen


def _ended(step: int, saved: int | None, owner: bool) -> str:
    """How a run ended before its last step.  owner: whether its lock is left.

    A stop saves, and gives the lock back; after an error the log may be ahead of the checkpoints."""
    if owner or step > (saved or 0):
        return CRASHED
    return STOPPED


def _lock(path: Path) -> tuple[bool, bool]:
    """Whether a training lives that holds the lock, and whether there is a lock at all.

    For another machine its age decides, by this machine's clock: asking the file server's would
    write into the folder."""
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False, False
    # Reading a pipe would wait for its other end.
    owner = lock.read(path) if path.is_file() else {}
    here = lock.lives(owner)
    return (age < lock.DEAD if here is None else here), True


def _configuration(path: Path) -> str:
    """What is wrong with it, or ''."""
    try:
        raw = yaml.safe_load(_bytes(path))
    except OSError as e:
        return f"config.yaml cannot be read ({e.strerror})"
    except (yaml.YAMLError, ValueError, RecursionError):
        return "config.yaml is no YAML"
    return "" if isinstance(raw, dict) and "run" in raw else "config.yaml is not that of a run"


def _bytes(path: Path, most: int = -1) -> bytes:
    with _opened(path) as f:
        return f.read(most)


def _opened(path: Path) -> BinaryIO:
    """Raises OSError also for a pipe, which would wait for its other end, and a device."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no file")
    return path.open("rb")


def _saved(folder: Path) -> tuple[int | None, str]:
    """The step of the newest checkpoint, and what is wrong with it."""
    path = folder / "checkpoints" / "last"
    try:
        name = _bytes(path, 100).decode("ascii", errors="replace").strip()
    except FileNotFoundError:
        return None, ""
    except OSError as e:
        return None, f"checkpoints/last cannot be read ({e.strerror})"
    found = re.fullmatch(r"step_(\d{1,18})", name, re.ASCII)
    if not found:
        return None, "checkpoints/last names no checkpoint"
    there = (path.parent / name / "state.pt").is_file()
    return (int(found[1]), "") if there else (None, f"checkpoints/{name} is not there")


def _metrics(path: Path, seen: Seen) -> float | None:
    """Fills what the log tells; returns the time of its newest entry, None where it has none.

    Raises UserError where no line of it is an entry."""
    when, damaged, entries = None, 0, 0
    try:
        with _opened(path) as f:
            for line in f:
                entry = _entry(line)
                if entry is None:
                    # The last one may be half written at this moment.
                    damaged += line.endswith(b"\n")
                    continue
                entries += 1
                when = entry.pop("time", when)
                _add(seen, entry)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"metrics.jsonl cannot be read ({e.strerror})") from None
    if damaged and not entries:
        raise UserError("metrics.jsonl holds no entry of a run")
    if damaged:
        seen.note = f"{damaged} damaged line{'s' * (damaged > 1)} in metrics.jsonl"
    return when


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line's step, time and finite numbers; None where it is none."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or type(raw.get("step")) is not int or raw["step"] < 0:
        return None
    numbers = {k: v for k, v in raw.items() if type(v) in (int, float) and math.isfinite(v)}
    return numbers if len(numbers) == len(raw) else None


def _add(seen: Seen, entry: dict[str, Any]) -> None:
    step = entry.pop("step")
    seen.scores.add(entry)
    for name in (k for k in entry if k.startswith("eval/") and k.endswith("/knn_top1")):
        seen.knn.setdefault("/".join(name.split("/")[1:-1]), []).append((step, entry[name]))
    if "train/epoch" in entry:
        seen.step, seen.values = step, entry
        seen.eta = entry.get("perf/eta")
        if seen.eta is not None and entry.get("perf/step_time", 0.0) > 0:
            # The meter writes the time left as this time, times the steps left.
            seen.steps = step + round(seen.eta / entry["perf/step_time"])
