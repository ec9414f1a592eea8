"""What sets runs apart: keys of their configurations and environments."""

import json
from collections.abc import Sequence
from typing import Any

from fastdisco.config import flatten
from fastdisco.report.collect import Run

# Of a run by its nature: no difference that explains a number.
_OWN = ("run.name", "run.out", "command")
# The keys that tell a run alone.
_FIRST = (
    *("student.arch", "teacher.file", "method.name", "data.train", "data.val", "run.epochs"),
    *("run.max_steps", "run.seed", "data.batch", "view.size", "optim.name", "optim.lr"),
)


def configurations(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run): the keys that differ, or of one run the first ones."""
    flat = [flatten(run.cfg.model_dump(mode="json")) for run in runs]
    return _rows(flat) if len(runs) > 1 else _picked(flat, _FIRST)


def environments(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The same of env.json; of one run the whole."""
    flat = [flatten(run.env) for run in runs]
    if len(runs) > 1:
        return _rows(flat)
    return _picked(flat, sorted(k for k in flat[0] if k != "command"))


def _rows(flat: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    keys = sorted(set().union(*flat))
    shown = [(k, [_text(f.get(k)) for f in flat]) for k in keys if k not in _OWN]
    return [(k, values) for k, values in shown if len({*values}) > 1]


def _picked(flat: list[dict[str, Any]], keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    return [(k, [_text(f[k]) for f in flat]) for k in keys if all(k in f for f in flat)]


def _text(value: Any) -> str:
    if value is None:
        return "—"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
