"""The command `fastdisco`: data sets, trainings, teachers, evaluations."""

import argparse
import sys

from fastdisco import __version__
from fastdisco.commands import data, evaluate, teacher, train
from fastdisco.common.console import refuse
from fastdisco.common.errors import UserError

# In the order of a user's work.
GROUPS = {"data": data, "train": train, "teacher": teacher, "eval": evaluate}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, or 2 where a user's error stopped it."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if not argv:
        parser.print_help()
        return 0
    args = _parse(parser, argv)
    try:
        return args.run(args) or 0
    except UserError as e:
        return refuse(e)


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(
        f"  {f'{name} {command}'.strip():<16}{what}"
        for name, group in GROUPS.items()
        for command, what in group.COMMANDS.items()
    )
    parser = argparse.ArgumentParser(
        prog="fastdisco",
        usage="fastdisco [-h] [--version] COMMAND ...",
        description="Trains small vision models by DisCo's self-supervised distillation.",
        epilog=f"commands:\n{commands}\n\nfastdisco COMMAND --help says what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastdisco {__version__}")
    groups = parser.add_subparsers(required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    for name, group in GROUPS.items():
        group.add(groups.add_parser(name, description=group.__doc__))
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(x.startswith("-") for x in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # argparse takes no more positional arguments once an option has stood between them.
    if rest:
        args.overrides += rest
    return args


if __name__ == "__main__":
    sys.exit(main())
