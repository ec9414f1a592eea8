"""Follows a run, without touching it: from another terminal, or another host that sees its folder."""

import argparse
import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastdisco.common.console import console, say
from fastdisco.common.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fastdisco.run.seen import Seen

COMMANDS = {"": "follow a run; Ctrl-C ends the watching alone"}


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco watch`."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--every", type=_seconds, default=2.0, metavar="SECONDS", help="between looks; by default 2"
    )
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Shows the run until it has ended, or until Ctrl-C."""
    from fastdisco.run import seen

    if args.folder not in seen.find(args.folder):
        raise UserError(
            f"{args.folder}: is no run; `{shlex.join(['fastdisco', 'runs', str(args.folder)])}` lists "
            "those in it"
        )
    looks = _looks(lambda: seen.look(args.folder), args.every)
    # Ctrl-C ends the watching, not the run: that is another process.
    with contextlib.suppress(KeyboardInterrupt):
        _live(looks) if console.is_terminal else _lines(looks)
    say(ending(seen.look(args.folder)))


def ending(found: "Seen") -> str:
    """The sentence that says how a run is."""
    from fastdisco.run import seen

    note = f" ({found.note})" if found.note else ""
    at = f"step {found.step}" + (f" of {found.steps}" if found.steps else "")
    ways = {
        seen.FINISHED: "finished",
        seen.STOPPED: f"stopped at {at}; the same command continues it",
        seen.CRASHED: f"failed or was killed, last seen at {at}; the same command continues from the "
        "last checkpoint",
        seen.MALFORMED: "malformed",
        seen.RUNNING: f"running, at {at}",
    }
    return f"{found.folder}: {ways[found.state]}{note}"


def _looks(look: Callable[[], "Seen"], every: float) -> Iterator["Seen"]:
    """The run again and again, until it no longer trains."""
    from fastdisco.run import seen

    while True:
        found = look()
        yield found
        if found.state != seen.RUNNING:
            return
        time.sleep(every)


def _live(looks: Iterator["Seen"]) -> None:
    """On a terminal: the training's own lines, with the curve of the kNN accuracy under them."""
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        for found in looks:
            live.update(picture(found), refresh=True)


def picture(found: "Seen") -> "RenderableType":
    """A run as its training shows it, and the curves of its kNN accuracy."""
    from rich.console import Group
    from rich.text import Text

    from fastdisco.run.progress import Bar, sparkline

    bar = Bar(found.step, found.steps or 0, found.scores)
    bar.values = found.values | ({} if found.eta is None else {"perf/eta": found.eta})
    curves = []
    for student, curve in found.knn.items():
        accuracies = [x for _, x in curve]
        room = max(min(console.width - 40, 60), 4)
        drawn = sparkline(accuracies, room, console.options.ascii_only)
        line = f"kNN {min(accuracies):.1%} {drawn} {max(accuracies):.1%}  {student}"
        curves.append(Text(line.rstrip(), no_wrap=True, overflow="ellipsis"))
    # The state first: a long path is cut.
    title = Text(f"{found.state}: {found.folder}", no_wrap=True, overflow="ellipsis")
    return Group(title, bar, *curves)


def _lines(looks: Iterator["Seen"]) -> None:
    """Elsewhere: a line for each new log point and each new evaluation."""
    from fastdisco.run.progress import plain

    step, evaluations = -1, None
    for found in looks:
        total = found.steps or 0
        complete = {"perf/eta", "perf/total_ips", "perf/data_share"} <= found.values.keys()
        if found.step != step and complete:
            say(plain(found.step, total, found.values, found.scores))
        counts = {name: len(curve) for name, curve in found.knn.items()}
        for name, n in counts.items():
            # What was there before is history.
            for at, accuracy in found.knn[name][
                n if evaluations is None else evaluations.get(name, 0) :
            ]:
                say(f"step {at}/{total}  {f'{name} ' if name else ''}kNN top-1 {accuracy:.2%}")
        step, evaluations = found.step, counts


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("a number from 0.1 to 3600")
    return value
