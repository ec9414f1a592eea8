"""What a run's folder says of it, read once: configuration, environment, metrics, evaluations, and a
sentence for each thing that is missing or damaged."""

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from fastdisco import config
from fastdisco.common.errors import UserError
from fastdisco.common.files import read_json, read_regular
from fastdisco.common.urls import Url
from fastdisco.config import Config
from fastdisco.data.lines import for_shell
from fastdisco.evals import results
from fastdisco.evals.results import Result

# A lock that was not renewed for so many seconds is of a killed training, as in run/lock.py.
DEAD = 60.0
# Of a network, as `fastdisco export` names them.
FORMS = {"torch": "fp32, torch", "onnx": "fp32, ONNX", "int8": "int8, ONNX"}
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.")


@dataclass(frozen=True)
class Measured:
    """The evaluations of one network's last weights, and what its export holds."""

    results: list[Result] = field(default_factory=list)
    bench: list[dict[str, Any]] = field(default_factory=list)  # rows of export/bench.json
    machine: str = ""  # where they were measured
    export: dict[str, Any] = field(default_factory=dict)  # export/export.json


@dataclass(frozen=True)
class Run:
    """A run, or one of its students where it has several."""

    name: str
    folder: Path
    student: str  # '' where there is one
    cfg: Config  # as the student would have it alone
    env: dict[str, Any]
    entries: list[dict[str, float]]  # of metrics.jsonl, under the names of a single student
    starts: list[float]  # seconds since 1970 at which a training began there, ascending
    steps: int | None  # of the whole training; None: not known yet
    live: bool
    measured: Measured
    remarks: list[str]

    def at(self, path: Path) -> Path:
        """A path of the configuration: relative ones are of the folder in which the training ran."""
        if isinstance(path, Url) or path.is_absolute() or path.exists():
            return path
        own = self.folder.resolve().parts
        tail = (*self.cfg.run.out.parts, self.cfg.run.name)
        if self.cfg.run.out.is_absolute() or own[-len(tail) :] != tail:
            return path
        return Path(*own[: -len(tail)]) / path

    @property
    def step(self) -> int:
        return int(self.entries[-1]["step"]) if self.entries else 0

    @property
    def state(self) -> str:
        """A clause for people."""
        if not self.entries:
            return "has no metrics yet" + ", still going" * self.live
        done = f"step {self.step}" + (f" of {self.steps}" if self.steps else "")
        if self.steps and self.step >= self.steps:
            return f"{done}, done"
        return f"{done}, {'still going' if self.live else 'stopped'}"


def read(folders: Sequence[Path], overrides: Sequence[str] = ()) -> list[Run]:
    """The runs of these folders in their order; of a run with several students one for each.

    overrides: laid over each configuration, for data that lie elsewhere now
    Raises UserError for a folder that is no run, or is named twice."""
    whole = [f.resolve() for f in folders]
    for folder, path in zip(folders, whole):
        if whole.count(path) > 1:
            raise UserError(f"{folder}: is named twice; name each run once")
    names = [p.name for p in whole]
    titles = [p.name if names.count(p.name) == 1 else str(f) for f, p in zip(folders, whole)]
    return [run for f, title in zip(folders, titles) for run in _runs(f, title, overrides)]


def measured(results_of: Path, export: Path, remarks: list[str]) -> Measured:
    """What these folders hold of a network; files that cannot be read are remarked on."""
    found = _results(results_of, remarks)
    bench = _object(export / "bench.json", remarks)
    rows = bench.get("rows", [])
    whole = [r for r in rows if _is_measured(r)] if isinstance(rows, list) else []
    if len(whole) < len(rows):
        remarks.append("bench.json: some rows lack a form, bytes, MACs or latency and are left out")
    about = bench.get("machine")
    machine = ""
    if whole and isinstance(about, dict):
        machine = f"{about.get('cpu', 'unknown CPU')}, {about.get('cores', '?')} cores"
    return Measured(found, whole, machine, _object(export / "export.json", remarks))


def _runs(folder: Path, title: str, overrides: Sequence[str]) -> Iterator[Run]:
    described = folder / "config.yaml"
    if not described.is_file():
        raise UserError(f"{folder}: is no run (no config.yaml); give the folder of a run")
    cfg = config.load(described, overrides)
    shared: list[str] = []
    env = _object(folder / "env.json", shared)
    entries = _entries(folder / "metrics.jsonl", shared)
    starts, live = _starts(folder / "tb"), _lives(folder / ".lock")
    if cfg.data.val is None:
        shared.append("it has no validation images (data.val: null), so nothing evaluates it")
    if cfg.teacher is None:
        shared.append("it has no teacher: the student learns alone")
    for student, own in config.students(cfg).items():
        remarks = list(shared)
        whole = measured(folder / "eval" / student, folder / "export" / student, remarks)
        if not whole.results:
            remarks.append(f"no evaluation yet: fastdisco eval all {for_shell(str(folder))}")
        mine = [_of_student(e, student) for e in entries]
        name = f"{title} · {student}" if student else title
        steps = _steps(cfg, mine)
        yield Run(name, folder, student, own, env, mine, starts, steps, live, whole, remarks)


def _object(path: Path, remarks: list[str]) -> dict[str, Any]:
    """A file of one JSON object; {} where there is none."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        remarks.append(f"{path.name} cannot be read ({e})")
        return {}
    if not isinstance(found, dict):
        remarks.append(f"{path.name} is no JSON object")
        return {}
    return found


def _entries(path: Path, remarks: list[str]) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, without what is no entry and no finite number."""
    try:
        lines = read_regular(path).decode(errors="replace").splitlines()
    except FileNotFoundError:
        remarks.append("metrics.jsonl is not there: the run has logged nothing yet")
        return []
    except OSError as e:
        remarks.append(f"metrics.jsonl cannot be read ({e.strerror})")
        return []
    found, damaged, strange = [], 0, 0
    for line in lines:
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
            continue
        numbers = {k: v for k, v in entry.items() if is_number(v)}
        strange += len(entry) - len(numbers)
        if is_number(step):
            found.append(numbers)
        else:
            damaged += 1
    if damaged:
        remarks.append(f"metrics.jsonl: {damaged} of {len(lines)} lines are damaged and left out")
    if strange:
        remarks.append(f"metrics.jsonl: {strange} values are no finite numbers and left out")
    return found


def _is_measured(row: Any) -> bool:
    """Whether a row of bench.json has what the figures need, all above 0."""
    if not isinstance(row, dict) or row.get("form") not in FORMS:
        return False
    found = [row.get(key) for key in ("bytes", "macs", "p50_ms_1_thread")]
    return all(is_number(v) and v > 0 for v in found)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number; JSON has others, and true."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _starts(folder: Path) -> list[float]:
    """Each start of a training opens a file of TensorBoard's, whose name has the time."""
    found = (_EVENTS.match(p.name) for p in folder.glob("events.out.tfevents.*"))
    return sorted({float(m[1]) for m in found if m})


def _lives(lock: Path) -> bool:
    try:
        return time.time() - lock.stat().st_mtime < DEAD
    except OSError:
        return False


def _of_student(entry: dict[str, float], student: str) -> dict[str, float]:
    """An entry without the other students' values: train/NAME/loss -> train/loss."""
    if not student:
        return entry
    out = {}
    for key, value in entry.items():
        group, *rest = key.split("/")
        if len(rest) < 2:
            out[key] = value
        elif rest[0] == student:
            out["/".join([group, *rest[1:]])] = value
    return out


def _steps(cfg: Config, entries: list[dict[str, float]]) -> int | None:
    """Of the whole training: the log tells by the time that it expects to need."""
    for e in reversed(entries):
        if "perf/eta" in e and e.get("perf/step_time"):
            return round(e["step"] + e["perf/eta"] / e["perf/step_time"])
    return cfg.run.max_steps


def _results(folder: Path, remarks: list[str]) -> list[Result]:
    """Of the weights that were evaluated last."""
    found: list[Result] = []
    # By time, and by name where a copy has made the times alike.
    paths = sorted(folder.glob("*-????????.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    for path in paths:
        try:
            found.append(results.read(path))
        except UserError as e:
            remarks.append(f"{path.name} is no result and left out ({e})")
    same = [r for r in found if r.protocol["network"] == found[-1].protocol["network"]]
    if len(same) < len(found):
        remarks.append(f"{len(found) - len(same)} evaluations of earlier weights are left out")
    return sorted(same, key=lambda r: (r.what, r.hash))
