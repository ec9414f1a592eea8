"""Tables of results: Markdown for README.md and docs/, rich tables and plain lines for a
terminal."""

import json
import re
import statistics
from pathlib import Path

from harness import readers

MARKED = re.compile(
    r"(<!-- bench:(\w+)(?: (full|readers):(\S+))? -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL
)
# Why a row may have its value in the result of another device.
ELSEWHERE = re.compile(r"^no (NVIDIA )?GPU\b|^not asked for")
# A table that the bench made itself, under its name in the result's `tables`.
NAMED = re.compile(r"(<!-- table:(\w+):(\w+) -->\n).*?(<!-- /table:\2:\3 -->)", re.DOTALL)


def fill(text: str, results: Path) -> str:
    """The text, with each marked table made anew from the results in the folder.

    A table stands between <!-- bench:NAME --> and <!-- /bench:NAME -->; NAME is the bench.  With
    <!-- bench:NAME full:PAGE --> it has the measured rows alone, and a link to PAGE, which has
    all.  With <!-- bench:NAME readers:PAGE --> it is the one of readers.py.  Between
    <!-- table:NAME:TABLE --> and <!-- /table:NAME:TABLE --> stands one of the tables that the bench
    itself put into its results."""

    def filled(m: re.Match[str]) -> str:
        made = for_readers if m[3] == "readers" else markdown
        return m[1] + made(m[2], results, m[4]) + m[5]

    text = NAMED.sub(lambda m: m[1] + named(m[2], m[3], results) + m[4], text)
    return MARKED.sub(filled, text)


def named(bench: str, table: str, results: Path) -> str:
    """One table of the bench's results, one device after another."""
    found = [json.loads(p.read_text()) for p in sorted(results.glob(f"{bench}-*.json"))]
    made = [_cells(**r["tables"][table]) for r in found if table in r.get("tables", {})]
    return "\n".join(made) or "Not measured yet.\n"


def _cells(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown of a table; a short row is filled up."""
    filled = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
    lines = [columns, ["---"] * len(columns), *filled]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(bench: str, results: Path, full: str | None = None) -> str:
    """The summaries of a bench's results, one device after another."""
    found = _results(bench, results)
    return "\n".join(_one(result, full) for result in found) or "Not measured yet.\n"


def for_readers(bench: str, results: Path, full: str) -> str:
    """The rows that readers.py tells, one device after another, and a link to the page with all."""
    found = _results(bench, results)
    return "\n".join(_told(result, full) for result in found) or "Not measured yet.\n"


def _results(bench: str, results: Path) -> list[dict]:
    """A bench's results that have something to tell.  A row that has no value for want of a GPU, or
    since it was not asked for, is left out where another result has it."""
    found = [json.loads(p.read_text()) for p in sorted(results.glob(f"{bench}-*.json"))]
    told = {r["name"] for one in found for r in one["summary"] if r["value"] is not None}
    for one in reversed(found):
        one["summary"] = [
            r
            for r in one["summary"]
            if r["name"] not in told or r["value"] is not None or not ELSEWHERE.search(r["reason"])
        ]
        told |= {r["name"] for r in one["summary"]}
    return [one for one in found if one["summary"]]


def _told(result: dict, full: str) -> str:
    rows = [f"| {what} | {value} |" for what, value in readers.told(result)]
    where = f"Measured on {_hardware(result)}, {result['date']}; every figure: [{full}]({full})."
    return "\n".join(["| what | measured |", "|---|---|", *rows, "", where]) + "\n"


def _hardware(result: dict) -> str:
    cores = f"{result['cores']} core{'s' * (result['cores'] != 1)}"
    return ", ".join(result["gpus"]) or f"{result['cpu']}, {cores}"


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
    for r in rows:
        aim = "" if r["aim"] is None else _number(r["aim"])
        lines.append(f"| {r['name']} | {_value(r)} | {r['unit']} | {aim} |")
    if left := len(result["summary"]) - len(rows):
        lines += ["", f"Rows not measured yet: {left}, see [{full}]({full})."]
    if remark := result.get("remark"):
        lines += ["", remark]
    return "\n".join(lines) + "\n"


def _value(r: dict) -> str:
    return f"not measured: {r['reason']}" if r["value"] is None else _number(r["value"])


def _number(x: float) -> str:
    return f"{x:.4g}"


def show_rows(summary: list[dict]) -> None:
    """Prints a line for each row: name, value, unit, quartiles and aim."""
    for r in summary:
        line = f"{r['name']:32} {_value(r)}"
        if r["value"] is not None:
            line += f" {r['unit']}"
        if "quartiles" in r:
            line += ", quartiles {} and {}".format(*r["quartiles"])
        if r["aim"] is not None:
            line += f" (aim {_number(r['aim'])})"
        print(line)


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a rich table; all but the first column are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    Console(width=120).print(table)


def percent(values: list[float]) -> str:
    """Mean and standard deviation of shares, in per cent; the mean alone where there is one."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean
