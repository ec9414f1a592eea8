"""Accuracy against what a network costs: latency, size and MACs, of every run and format."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdisco.report import scale
from fastdisco.report.collect import FORMS, Measured, Run, is_number
from fastdisco.report.networks import TEACHER, Network, cost

# Places in a panel's drawing, pixels.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 230, 44, 12, 12, 38
# How results name an accuracy on frozen features, the one to report first (docs/evaluation.md).
_RULES = ("selected", "preset_last", "preset_best_on_val", "best_on_val")
_KINDS = ("linear", "logistic", "ridge", "sgd")
_SEMI = "semi-1pct"
COSTS = {
    "ms": "p50 latency of one image, one thread, ms",
    "mb": "size of the weights, MB",
    "mmacs": "MACs of one image, millions",
}


@dataclass(frozen=True)
class Point:
    network: str
    run: int | None
    form: str  # a key of FORMS
    grey: bool  # the teacher
    accuracy: dict[str, float]  # percent, by the value's name
    cost: dict[str, float]  # by the keys of COSTS
    rejected: bool = False  # int8 beyond its gate


@dataclass(frozen=True)
class Mark:
    """A point in a panel."""

    x: float
    y: float
    point: Point
    title: str


@dataclass(frozen=True)
class Panel:
    title: str
    lacking: str  # a sentence where there is nothing to draw
    marks: list[Mark] = field(default_factory=list)
    front: str = ""  # points of a polyline
    across: list[tuple[float, str]] = field(default_factory=list)  # ticks
    up: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """One accuracy against the three costs."""

    key: str
    title: str
    lacking: str
    panels: list[Panel] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    def json(self) -> list[dict[str, Any]]:
        return [
            {
                "network": p.network,
                "form": FORMS[p.form],
                "teacher": p.grey,
                "accuracy": p.accuracy[self.key],
                **p.cost,
            }
            for p in self.points
        ]


def groups(runs: Sequence[Run], networks: Sequence[Network]) -> list[Group]:
    """kNN, linear and 1 % of the labels, each where it was measured."""
    points = [p for n in networks for p in _points(n, _side(runs, n))]
    knn = _group(
        points, "knn_top1", "kNN accuracy, %", "No kNN accuracy yet: fastdisco eval knn RUN."
    )
    linear, one = _most(points, _linear), _most(points, _one_percent)
    return [
        knn,
        _group(
            points,
            linear,
            _told("Accuracy on frozen features, %", linear),
            "No linear accuracy yet: fastdisco eval linear RUN.",
        ),
        _group(
            points,
            one,
            _told("Accuracy with 1 % of the labels, %", one),
            "No accuracy with 1 % of the labels yet: fastdisco eval semi RUN.",
        ),
    ]


def _told(title: str, value: str) -> str:
    """With the value's name, where there is one."""
    return f"{title} ({value})" if value else title


def _side(runs: Sequence[Run], network: Network) -> int:
    run = runs[network.run] if network.run is not None else runs[0]
    return run.cfg.data.eval_size


def _points(n: Network, image: int) -> list[Point]:
    measured, out = n.measured, []
    own = {
        r.named(k): round(100 * v, 6)
        for r in measured.results
        for k, v in r.values.items()
        if (k == "knn_top1" or "_top1_" in k) and math.isfinite(v)
    }
    rows = {row["form"]: row for row in measured.bench}
    known = _costs(rows.get("torch"))
    if not known and n.net is not None:
        size, macs = cost(n.net, image)
        known = {"mb": size / 1e6, "mmacs": macs / 1e6}
    make = lambda form, accuracy, costs, rejected=False: Point(
        n.name, n.run, form, n.role == TEACHER, accuracy, costs, rejected
    )
    if own:
        out.append(make("torch", own, known))
    files = _files(measured)
    for form in ("onnx", "int8"):
        costs = _costs(rows.get(form))
        # ONNX in float32 computes the same features: its accuracies are the network's.
        accuracy = (own if form == "onnx" else {}) | files.get(form, {})
        if accuracy and (form in rows or form in files):
            rejected = form == "int8" and not measured.export["int8"].get("passed", True)
            out.append(make(form, accuracy, costs, rejected))
    return out


def _costs(row: dict[str, Any] | None) -> dict[str, float]:
    if row is None:
        return {}
    return {
        "mb": row["bytes"] / 1e6,
        "mmacs": row["macs"] / 1e6,
        "ms": row["p50_ms_1_thread"],
    }


def _files(measured: Measured) -> dict[str, dict[str, float]]:
    """Accuracies that were measured on the exported files themselves."""
    found = measured.export.get("int8")
    if not isinstance(found, dict):
        return {}
    both = {"onnx": found.get("fp32") or {}, "int8": found.get("values") or {}}
    return {
        form: {k: round(100 * v, 6) for k, v in values.items() if is_number(v)}
        for form, values in both.items()
        if values
    }


def _linear(key: str) -> bool:
    return any(key.startswith(f"{kind}_top1_") for kind in _KINDS)


def _one_percent(key: str) -> bool:
    return key.startswith(_SEMI) and "_top1_" in key


def _most(points: Sequence[Point], fits: Any) -> str:
    """The value that most points have; of several the one to report first."""
    found: dict[str, int] = {}
    for p in points:
        for key in filter(fits, p.accuracy):
            found[key] = found.get(key, 0) + 1
    rank = lambda key: (-found[key], _place(key), key)
    return min(found, key=rank, default="")


def _place(key: str) -> tuple[int, int]:
    name = key.rpartition("/")[2]
    kind = next((i for i, k in enumerate(_KINDS) if name.startswith(k)), len(_KINDS))
    rule = next((i for i, r in enumerate(_RULES) if name.endswith(f"_top1_{r}")), len(_RULES))
    return kind, rule


def _group(points: Sequence[Point], key: str, title: str, lacking: str) -> Group:
    some = [p for p in points if key in p.accuracy]
    if not some:
        return Group(key, title, lacking)
    return Group(key, title, "", [_panel(some, key, c, t) for c, t in COSTS.items()], some)


def _panel(points: Sequence[Point], key: str, cost_of: str, title: str) -> Panel:
    some = [p for p in points if cost_of in p.cost]
    if not some:
        return Panel(title, "Not measured yet: fastdisco export RUN --to onnx int8 --bench cpu.")
    across = scale.around([p.cost[cost_of] for p in some], LEFT, WIDTH - RIGHT, log=True)
    up = scale.around([p.accuracy[key] for p in some], HEIGHT - BOTTOM, TOP)
    marks = [
        Mark(across.at(p.cost[cost_of]), up.at(p.accuracy[key]), p, _said(p, key, cost_of, title))
        for p in some
    ]
    front = " ".join(f"{m.x},{m.y}" for m in _front(marks))
    return Panel(title, "", marks, front, across.ticks(), up.ticks())


def _said(p: Point, key: str, cost_of: str, title: str) -> str:
    rejected = ", rejected by its gate" if p.rejected else ""
    what = title.partition(",")[0]
    unit = {"ms": "ms", "mb": "MB", "mmacs": "million"}[cost_of]
    return (
        f"{p.network}, {FORMS[p.form]}{rejected}: {p.accuracy[key]:.2f} %, "
        f"{what} {p.cost[cost_of]:.4g} {unit}"
    )


def _front(marks: Sequence[Mark]) -> list[Mark]:
    """The students that no other beats in both, from cheap to dear."""
    found: list[Mark] = []
    # Up is a smaller y.
    for m in sorted((m for m in marks if not m.point.grey), key=lambda m: (m.x, m.y)):
        if not found or m.y < found[-1].y:
            found.append(m)
    return found
