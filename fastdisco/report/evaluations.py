"""The table of results: what has one protocol stands in one row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdisco.evals.results import Result, comparable, is_share, number, short_hash
from fastdisco.report.networks import Network

# What readers ask for first; `semi-1pct-try0` is a kind of semi.
_ORDER = ("knn", "linear", "semi", "finetune", "ridge", "logistic", "sgd", "transfer", "retrieve")


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str
    about: str  # the result's own hash and its time


@dataclass(frozen=True)
class Row:
    what: str
    value: str
    protocol: str  # hash of what must be equal to compare: all but network and versions
    cells: list[Cell | None]  # in the order of the networks


def table(networks: Sequence[Network]) -> list[Row]:
    """Rows in the order of evaluations and values; a value with two protocols has two rows."""
    found: dict[tuple[str, str, str], dict[int, Cell]] = {}
    for i, network in enumerate(networks):
        for result in network.measured.results:
            protocol = short_hash(comparable(result.protocol))
            for key in result.values:
                found.setdefault((result.what, key, protocol), {})[i] = _cell(key, result)
    return [
        Row(*key, [cells.get(i) for i in range(len(networks))])
        for key, cells in sorted(found.items(), key=lambda item: _place(item[0][0]))
    ]


def times(networks: Sequence[Network]) -> list[tuple[str, list[str]]]:
    """(evaluation, seconds that it took for each network)"""
    whats = sorted({r.what for n in networks for r in n.measured.results}, key=_place)
    return [(what, [_seconds(n, what) for n in networks]) for what in whats]


def _place(what: str) -> tuple[int, str]:
    kind = what.partition("-")[0]
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER), what


def json(networks: Sequence[Network]) -> dict[str, list[dict[str, Any]]]:
    """Every result as its file has it, less the protocol."""
    return {
        n.name: [
            {"what": r.what, "hash": r.hash, "seconds": r.seconds}
            | {"values": {k: v if math.isfinite(v) else None for k, v in r.values.items()}}
            | {"intervals": r.intervals}
            for r in n.measured.results
        ]
        for n in networks
    }


def _seconds(network: Network, what: str) -> str:
    found = [r.seconds for r in network.measured.results if r.what == what]
    return " + ".join(f"{s:.1f}" for s in found) or "—"


def _cell(key: str, result: Result) -> Cell:
    value: Any = result.values[key]
    text = f"{100 * value:.2f}" if is_share(key) else number(value)
    ends = result.intervals.get(key)
    interval = f"{100 * ends[0]:.2f} to {100 * ends[1]:.2f}" if ends else ""
    return Cell(text, interval, f"{result.hash}, {result.seconds:.1f} s")
