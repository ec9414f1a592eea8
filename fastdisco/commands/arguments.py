"""Parsing that all commands share."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdisco.common.files import expanded


def command(
    sub: Any, name: str, what: str, run: Callable[[argparse.Namespace], int | None], **more: Any
) -> argparse.ArgumentParser:
    """Adds a command to a group's sub-parsers; `run` runs it and returns its exit code, None for
    0."""
    p = sub.add_parser(name, help=what, description=what, **more)
    p.set_defaults(run=run, parser=p)
    return p


def overrides(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the positional arguments block.key=value."""
    parser.add_argument("overrides", nargs="*", metavar="block.key=value", help=what)


def parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(those that name something, overrides), where several of both may stand in any order.  A file
    that is there is no override, whatever its name."""
    override = re.compile(r"\w+(\.\w+)+=")
    found = [w for w in words if override.match(w) and not Path(w).exists()]
    return [w for w in words if w not in found], found


def of_network(parser: argparse.ArgumentParser) -> None:
    """Adds what says more about a NET."""
    parser.add_argument(
        "--net",
        choices=("student", "ema"),
        default="student",
        help="of a run; ema: the mean student",
    )
    parser.add_argument(
        "--student", metavar="NAME", help="the name of one, for a run that has several"
    )
    parser.add_argument(
        "--arch", help="the timm model of a teacher's file, where the file does not say"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of timm:NAME")
    parser.add_argument("--untrained", action="store_true", help="timm:NAME with random weights")


def launched(parser: argparse.ArgumentParser) -> None:
    """Takes the argument that the deepspeed launcher passes; LOCAL_RANK says the same."""
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, of which overrides may stand between options; exits with 2 at unknown ones.

    In paths, ~ and environment variables are replaced.  `parser` of the namespace is the command's
    own, whose usage an error shows."""
    args, rest = parser.parse_known_args(argv)
    options = any(x.startswith("-") for x in rest)
    if rest and (options or not hasattr(args, "overrides")):
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # argparse takes no more positional arguments once an option has stood between them.
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        for name, value in vars(args).items():
            setattr(args, name, _expanded(value))
    except ValueError as e:
        args.parser.error(str(e))
    return args


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(x) for x in value]
    return expanded(value) if isinstance(value, Path) else value
