"""Rewrites the tables of README.md and docs/ from bench/results/: `python bench/report.py`;
`--check` fails where one is stale.

A table stands between <!-- bench:NAME --> and <!-- /bench:NAME -->; NAME is the bench.  <!--
bench:NAME full:PAGE --> has its measured rows alone, and says that PAGE has all."""

import argparse
import json
import re
import sys
from pathlib import Path

from common import RESULTS, ROOT

MARKED = re.compile(r"(<!-- bench:(\w+)(?: full:(\S+))? -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(argv).check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text()
        new = fill(old, RESULTS)
        if new != old:
            stale.append(path.name)
            if not check:
                path.write_text(new)
    if stale:
        print(("stale, run make results: " if check else "rewrote ") + ", ".join(stale))
    return 1 if check and stale else 0


def fill(text: str, results: Path) -> str:
    """The text with every marked table made anew."""
    return MARKED.sub(lambda m: m[1] + table(m[2], results, m[3]) + m[4], text)


def table(bench: str, results: Path, full: str | None = None) -> str:
    """The summaries of all devices' results of a bench, one after another; where a page has the
    full table, their measured rows."""
    return (
        "\n".join(
            _one(json.loads(p.read_text()), full) for p in sorted(results.glob(f"{bench}-*.json"))
        )
        or "Not measured yet.\n"
    )


def _one(result: dict, full: str | None) -> str:
    hardware = ", ".join(result["gpus"]) or f"{result['cpu']}, {result['cores']} cores"
    lines = [
        f"{hardware}; torch {result['versions']['torch']}; commit {result['commit']}; "
        f"{result['date']}; `{result['command']}`",
        "",
        "| row | value | unit | aim |",
        "|---|---|---|---|",
    ]
    rows = [r for r in result["summary"] if r["value"] is not None or not full]
    lines += [
        f"| {r['name']} | {_value(r)} | {r['unit']} | "
        f"{'' if r['aim'] is None else _number(r['aim'])} |"
        for r in rows
    ]
    if left := len(result["summary"]) - len(rows):
        lines += ["", f"Rows not measured yet: {left}, see [{full}]({full})."]
    return "\n".join(lines) + "\n"


def _value(r: dict) -> str:
    return f"not measured: {r['reason']}" if r["value"] is None else _number(r["value"])


def _number(x: float) -> str:
    return f"{x:.4g}"


if __name__ == "__main__":
    sys.exit(main())
