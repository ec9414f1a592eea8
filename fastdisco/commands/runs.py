"""Lists the runs in a folder, as they are now."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdisco.common.console import console, say

if TYPE_CHECKING:
    from fastdisco.run.seen import Seen

COMMANDS = {"": "list runs: state, step, time left, kNN accuracy"}

_COLUMNS = ("run", "state", "step", "ETA", "kNN", "best", "kNN so far", "age")
# What goes first where the terminal is narrow.
_LESS = ("kNN so far", "age", "ETA", "best")
# Columns of a sparkline.
_WIDTH = 16


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco runs`."""
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("out"),
        metavar="FOLDER",
        help="what holds runs, at any of three levels, or a run; by default out",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Prints a row for each run, or for each student of one."""
    from fastdisco.run import seen

    found = [seen.look(folder) for folder in seen.find(args.folder)]
    if args.json:
        print(json.dumps([_facts(each) for each in found], indent=1))
        return
    if not found:
        say(f"{args.folder}: no runs here; a training makes one in run.out, by default out")
        return
    rows = [row for each in found for row in _rows(each, args.folder)]
    for line in table(rows, console.width if console.is_terminal else None):
        print(line)


def _facts(found: "Seen") -> dict[str, Any]:
    """A run for --json; accuracies from 0 to 1, times in seconds, null for what is not known."""
    students = {
        name: {"last": curve[-1][1], "best": max(x for _, x in curve), "curve": curve}
        for name, curve in found.knn.items()
    }
    return {
        # A name that is no text could not be written.
        "run": str(found.folder).encode(errors="replace").decode(),
        "state": found.state,
        "note": found.note,
        "step": found.step,
        "steps": found.steps,
        "eta": found.eta,
        "age": found.age,
        "knn": students,
    }


def _rows(found: "Seen", below: Path) -> Iterator[dict[str, str]]:
    """A row for each student; the first has what is of the whole run.  A note is a row, too."""
    from fastdisco.run.progress import brief

    inside = found.folder != below and found.folder.is_relative_to(below)
    name = str(found.folder.relative_to(below) if inside else found.folder)
    row = {"run": shown(name), "state": found.state}
    if found.values:
        row["step"] = f"{found.step}/{found.steps or '?'}"
    if found.eta is not None:
        row["ETA"] = brief(found.eta)
    if found.age is not None:
        row["age"] = brief(found.age)
    alone = found.knn.get("") if len(found.knn) == 1 else None
    yield row | (_accuracy(alone) if alone else {})
    if not alone:
        for student, curve in found.knn.items():
            yield {"run": f"  {shown(student)}"} | _accuracy(curve)
    if found.note:
        yield {"run": f"  {found.note}", "": "whole"}


def _accuracy(curve: list[tuple[int, float]]) -> dict[str, str]:
    from fastdisco.run.progress import sparkline

    values = [accuracy for _, accuracy in curve]
    drawn = sparkline(values, _WIDTH, console.options.ascii_only)
    return {"kNN": f"{values[-1]:.1%}", "best": f"{max(values):.1%}", "kNN so far": drawn}


def table(rows: list[dict[str, str]], width: int | None) -> Iterator[str]:
    """Lines of columns.  width: of the terminal, which narrower columns and fewer of them must fit;
    None: everything is printed."""
    from rich.cells import cell_len, set_cell_size

    columns = [c for c in _COLUMNS if any(row.get(c) for row in rows) or c in ("run", "state")]
    cells = [dict(zip(columns, columns)), *rows]
    wide = {
        c: max(cell_len(row.get(c, "")) for row in cells if c != "run" or "" not in row)
        for c in columns
    }
    total = lambda: sum(wide[c] for c in columns) + 2 * (len(columns) - 1)
    for less in _LESS:
        if width and total() > width and less in columns:
            columns.remove(less)
    if width and total() > width:
        wide["run"] = max(wide["run"] - (total() - width), 6)
    for row in cells:
        if "" in row:
            yield row["run"]
            continue
        parts = []
        for column in columns:
            text = row.get(column, "")
            if cell_len(text) > wide[column]:
                text = set_cell_size(text, wide[column] - 2) + ".."
            parts.append(set_cell_size(text, wide[column]))
        yield "  ".join(parts).rstrip()


def shown(name: str) -> str:
    """A name as a terminal may print it: without control characters."""
    return "".join(c if c.isprintable() else "?" for c in name)
