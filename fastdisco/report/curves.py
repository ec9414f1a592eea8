"""Metrics over steps, and speed over time: the data of the line charts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdisco.report.collect import Run

# Points of a line at most; beyond them consecutive points are averaged.
POINTS = 400
# Titles and units of what readers ask for first, in their order.
KNOWN = {
    "train/loss": "Loss",
    "train/lr": "Learning rate",
    "eval/knn_top1": "kNN accuracy, %",
    "distill/cosine": "Cosine of the embeddings to the teacher's, in training",
    "eval/teacher_cosine": "Cosine of the embeddings to the teacher's, validation images",
    "eval/effective_rank": "Effective rank of the features",
    "feat/std": "Spread of the embeddings, in training",
    "eval/feature_std": "Spread of the features, validation images",
    "eval/teacher_neighbours": "Neighbours shared with the teacher, %",
    "eval/teacher_cka": "CKA with the teacher's features",
}
SPEED = {
    "perf/total_ips": "Images/s",
    "perf/data_share": "Waiting for data, % of the time",
    "perf/mem_gb": "Memory at its peak, GB",
}
# A run logs it from the first image on that broke.
ASIDE = "data/set_aside"
# What stands where a chart would.
LACKING = {
    "eval/knn_top1": "No kNN accuracy was logged: set eval.every, and data.val with classes.",
    "distill/cosine": "No run has a teacher, so there is no cosine to one.",
    "eval/effective_rank": "No rank was logged: set eval.every and data.val.",
}
_PERCENT = {"eval/knn_top1", "eval/teacher_neighbours", "perf/data_share"}
# Of no use as a line: the step says it.
_HIDDEN = {"train/epoch"}


@dataclass(frozen=True)
class Chart:
    key: str
    title: str
    axis: str
    # One for each run that has the metric: {"run": number in the page, "x": [...], "y": [...]}.
    lines: list[dict[str, Any]]
    lacking: str = ""  # a sentence where there are no lines
    # Times at which a run was started again: {"run": number, "x": [...]}.
    marks: list[dict[str, Any]] = field(default_factory=list)
    averaged: int = 1  # points of the log that one point stands for, at most

    def json(self) -> dict[str, Any]:
        return {"title": self.title, "axis": self.axis, "lines": self.lines, "marks": self.marks}


def over_steps(runs: Sequence[Run]) -> list[Chart]:
    """The losses and their terms, then the other known metrics, then what else was logged."""
    logged = dict.fromkeys(key for run in runs for entry in run.entries for key in entry)
    terms = [k for k in logged if k.startswith("train/loss_")]
    known = ["train/loss", *terms, *(k for k in KNOWN if k != "train/loss")]
    groups = ("train/", "feat/", "distill/", "eval/")
    rest = [k for k in logged if k.startswith(groups) and k not in known and k not in _HIDDEN]
    step = lambda run, entry: entry["step"]
    shown = [k for k in [*known, *rest] if k in logged or k in LACKING]
    return [_chart(runs, key, _title(key), "step", step) for key in shown]


def over_time(runs: Sequence[Run]) -> list[Chart]:
    """Speed, waiting and memory over the time since the first start, in `unit`s."""
    name, seconds = unit(runs)
    marks = [
        {"run": i, "x": [_short((s - _begin(run)) / seconds) for s in run.starts[1:]]}
        for i, run in enumerate(runs)
        if len(run.starts) > 1
    ]
    broke = any(ASIDE in e for run in runs for e in run.entries)
    titles = SPEED | ({ASIDE: "Images set aside, since they broke"} if broke else {})
    at = lambda run, entry: (entry["time"] - _begin(run)) / seconds
    charts = [_chart(runs, key, title, name, at) for key, title in titles.items()]
    return [Chart(c.key, c.title, c.axis, c.lines, c.lacking, marks, c.averaged) for c in charts]


def unit(runs: Sequence[Run]) -> tuple[str, float]:
    """(minutes or hours, in seconds), as the longest run asks for."""
    spans = (run.entries[-1].get("time", 0.0) - _begin(run) for run in runs if run.entries)
    return ("minutes", 60.0) if max(spans, default=0.0) < 3 * 3600 else ("hours", 3600.0)


def best(run: Run) -> tuple[float, float] | None:
    """The last and the best kNN accuracy, in percent."""
    found = [100 * e["eval/knn_top1"] for e in run.entries if "eval/knn_top1" in e]
    return (found[-1], max(found)) if found else None


def _title(key: str) -> str:
    if key in KNOWN:
        return KNOWN[key]
    return key.removeprefix("train/").replace("loss_", "Loss term: ")


def _begin(run: Run) -> float:
    """Seconds since 1970 at the first start, or at the first entry where no start is known."""
    times = [*run.starts[:1], *(e["time"] for e in run.entries[:1] if "time" in e)]
    return min(times, default=0.0)


def _chart(
    runs: Sequence[Run],
    key: str,
    title: str,
    axis: str,
    at: Callable[[Run, dict[str, float]], float],
) -> Chart:
    lines, averaged = [], 1
    for i, run in enumerate(runs):
        some = [e for e in run.entries if key in e and (axis == "step" or "time" in e)]
        if not some:
            continue
        factor = 100.0 if key in _PERCENT else 1.0
        x, y = [at(run, e) for e in some], [factor * e[key] for e in some]
        size = -(-len(x) // POINTS)
        averaged = max(averaged, size)
        lines.append({"run": i, "x": _thinned(x, size), "y": _thinned(y, size)})
    lacking = "" if lines else LACKING.get(key, f"No run has logged {key}.")
    return Chart(key, title, axis, lines, lacking, averaged=averaged)


def _thinned(values: list[float], size: int) -> list[float]:
    """Means of `size` consecutive values, the last of what is left."""
    parts = (values[i : i + size] for i in range(0, len(values), size))
    return [_short(sum(p) / len(p)) for p in parts]


def _short(value: float) -> float:
    """Six figures: a page of many points stays small.  Whole numbers stay whole."""
    return float(f"{value:.6g}") if not float(value).is_integer() else int(value)
