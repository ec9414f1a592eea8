"""The rows and the table of all faults of a soak."""

import statistics

import signals
from harness import row

_COLUMNS = ["fault", "injected", "survived", "steps lost", "seconds to go on"]


def rows(found: list[dict]) -> list[dict]:
    ended = [x["ended"] for x in found if x["ended"] is not None and "KILL" not in x["fault"]]
    few = None
    if len(ended) < signals.NEEDED:
        few = f"{len(ended)} signals were sent; a 99th percentile needs {signals.NEEDED}"
    p99 = None if few else round(signals.percentile(ended), 2)
    return [
        row("soak_faults", len(found), "", 1000, "higher"),
        row("soak_lost_beyond_checkpoint", total(found, "beyond"), "steps", 0, "lower"),
        row("soak_unequal", total(found, "unequal"), "losses", 0, "lower"),
        row("soak_hangs", total(found, "hang"), "", 0, "lower"),
        row("soak_survived", total(found, "survived"), "faults", None, "higher"),
        row("sigterm_p99_s", p99, "s", signals.AIM, "lower", few),
    ]


def total(found: list[dict], what: str) -> int:
    return sum(int(x[what]) for x in found)


def table(found: list[dict]) -> dict:
    """A line for each kind of fault."""
    kinds = dict.fromkeys(sorted(x["fault"] for x in found))
    lines = [_line(kind, [x for x in found if x["fault"] == kind]) for kind in kinds]
    return dict(columns=_COLUMNS, rows=[*lines, _line("all", found)])


def _line(name: str, some: list[dict]) -> list[str]:
    lost = [x["lost"] for x in some]
    seconds = [x["seconds"] for x in some if x["seconds"] is not None]
    went_on = f"{statistics.median(seconds):.1f}, at most {max(seconds):.0f}" if seconds else ""
    return [name, str(len(some)), str(total(some, "survived")), str(sum(lost)), went_on]
