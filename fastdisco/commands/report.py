"""Runs as one HTML file, to look at and to send on."""

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastdisco.commands import arguments
from fastdisco.common.console import say
from fastdisco.common.errors import UserError

if TYPE_CHECKING:
    from fastdisco.report import Run

COMMANDS = {"": "one HTML file about runs: curves, accuracy and cost, maps, neighbours, views"}
# Seconds between two pages of --watch.
WATCH = 30.0


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="(%(default)s)"
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=WATCH,
        metavar="SECONDS",
        help=f"write it anew so often, {WATCH:g} s unless told, until no run is going any more",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="whose views are shown; by default the last logged"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=50,
        metavar="N",
        help="of each class, among which nearest images are looked for (%(default)s); 0: none, and no "
        "network is read",
    )
    arguments.overrides(parser, "for data that lie elsewhere now, as data.val=/data/val")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Writes the page, once or until no run is going any more."""
    named, overrides = arguments.parted([*args.runs, *args.overrides])
    if not named:
        args.parser.error("name a run's folder")
    _check(args)
    from fastdisco import report
    from fastdisco.report import neighbours, page

    page.refuse(args.out)
    kept = neighbours.Kept()
    try:
        while True:
            runs = report.read([Path(x) for x in named], overrides)
            going = bool(args.watch) and any(r.live for r in runs)
            wanted = report.Wanted(args.step, args.images, args.watch if going else None)
            report.write(args.out, runs, wanted, kept)
            say(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB; {_told(runs)}")
            if not going:
                return
            time.sleep(args.watch)
    except KeyboardInterrupt:
        say("stopped as asked; the last page stays")


def _told(runs: list["Run"]) -> str:
    return ", ".join(f"{r.name} ({r.state})" for r in runs)


def _check(args: argparse.Namespace) -> None:
    # So written that nan fails, too.
    if args.watch is not None and not (args.watch >= 1 and math.isfinite(args.watch)):
        raise UserError(f"--watch: is {args.watch:g} seconds; give 1 or more")
    if args.step is not None and args.step < 1:
        raise UserError(f"--step: is {args.step}; steps count from 1")
    if args.images < 0:
        raise UserError(f"--images: is {args.images}; give 0 or more")
