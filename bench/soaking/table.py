"""The rows and the table of all faults of a soak."""

import os
import statistics

import signals
from harness import row

# The load that a training of two ranks makes by itself.
_OWN = 3
_COLUMNS = ["fault", "injected", "survived", "steps lost", "seconds to go on"]


def rows(found: list[dict]) -> list[dict]:
    return [
        row("soak_faults", len(found), "", 1000, "higher"),
        row("soak_lost_beyond_checkpoint", total(found, "beyond"), "steps", 0, "lower"),
        row("soak_unequal", total(found, "unequal"), "losses", 0, "lower"),
        row("soak_hangs", total(found, "hang"), "", 0, "lower"),
        row("soak_survived", total(found, "survived"), "faults", None, "higher"),
        _sigterm(found),
    ]


def _sigterm(found: list[dict]) -> dict:
    """Of the signals that were sent while others did not use the machine."""
    sent = [x for x in found if x["ended"] is not None and "KILL" not in x["fault"]]
    quiet = len(os.sched_getaffinity(0)) + _OWN
    some = [x["ended"] for x in sent if x.get("load", quiet + 1) <= quiet]
    reason = None
    if len(some) < signals.NEEDED:
        reason = f"{len(some)} signals were sent on a quiet machine; a 99th percentile needs "
        reason += str(signals.NEEDED)
        if len(sent) > len(some):
            longest = max(x["ended"] for x in sent)
            reason += f"; {len(sent) - len(some)} more were sent at a load above {quiet}, "
            reason += f"and the longest of all took {longest:.1f} s"
    value = None if reason else round(signals.percentile(some), 2)
    return row("sigterm_p99_s", value, "s", signals.AIM, "lower", reason)


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
