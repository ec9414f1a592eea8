"""What a check returns, and how findings are told."""

import json
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from fastdisco.common import launch
from fastdisco.common.console import say

Level = Literal["ok", "skipped", "warning", "failure"]


class Finding(NamedTuple):
    """What a check has found.

    skipped: the check could not be made here, and `found` says why."""

    check: str
    level: Level
    found: str
    # What to do; empty where nothing need be done.
    remedy: str = ""
    # The node, where there are several.
    where: str = ""


def ok(check: str, found: str) -> Finding:
    """Nothing need be done."""
    return Finding(check, "ok", found)


def skipped(check: str, why: str) -> Finding:
    """The check could not be made."""
    return Finding(check, "skipped", why)


def warning(check: str, found: str, remedy: str) -> Finding:
    """A training runs, but slower or less safely than it could."""
    return Finding(check, "warning", found, remedy)


def failure(check: str, found: str, remedy: str) -> Finding:
    """A training will fail."""
    return Finding(check, "failure", found, remedy)


def looked(check: Callable[..., Finding], *args: Any) -> Finding:
    """What a check finds; where it breaks, that is a failure: one check must not hide the others."""
    try:
        return check(*args)
    except Exception as e:
        words = (str(e).splitlines() or [""])[0]
        what = f"{type(e).__name__}: {words}"
        return failure(check.__name__, what, "mend what the error names, then look again")


def code(findings: Iterable[Finding]) -> int:
    """The exit code: 2 where something will fail, else 0."""
    return 2 if any(f.level == "failure" for f in findings) else 0


def line(f: Finding) -> str:
    """A finding as one line of text."""
    where = f"{f.where}: " if f.where else ""
    remedy = f"; {f.remedy}" if f.remedy else ""
    return f"{f.level:<8} {f.check:<16} {where}{f.found}{remedy}"


def size(n: float) -> str:
    """Bytes for a reader: 1.5 GiB, 20.0 MiB."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def summary(findings: list[Finding]) -> str:
    """How many there are of each kind that matters."""
    counts = {level: sum(f.level == level for f in findings) for level in ("failure", "warning")}
    if not any(counts.values()):
        return f"{len(findings)} checks, nothing to do"
    told = [f"{n} {level}{'s' * (n > 1)}" for level, n in counts.items() if n]
    return f"{len(findings)} checks: {', '.join(told)}"


class Report:
    """The findings by section, printed as they come or, as JSON, at the end; by rank 0 alone."""

    def __init__(self, as_json: bool) -> None:
        self.sections: dict[str, list[Finding]] = {}
        self._json, self._last = as_json, ""

    def add(self, section: str, findings: Iterable[Finding]) -> None:
        """Further findings of a section."""
        findings = list(findings)
        if findings and section != self._last:
            self.say(section)
            self._last = section
        held = self.sections.setdefault(section, [])
        for f in findings:
            held.append(f)
            self.say(f"  {line(f)}")

    def say(self, text: str) -> None:
        """A line for the reader of the text."""
        if not self._json:
            say(text)

    def code(self) -> int:
        """The exit code of what has been found so far."""
        return code(f for held in self.sections.values() for f in held)

    def end(self) -> int:
        """Prints what is left to print and returns the exit code."""
        self.say(summary([f for held in self.sections.values() for f in held]))
        if self._json and launch.rank() == 0:
            rows = [
                {"section": name, **f._asdict()}
                for name, held in self.sections.items()
                for f in held
            ]
            print(json.dumps({"code": self.code(), "findings": rows}), flush=True)
        return self.code()
