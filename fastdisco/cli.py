"""The command `fastdisco`: data sets, trainings, teachers, evaluations, exports, reports."""

import argparse
import sys

from fastdisco import __version__
from fastdisco.commands import (
    arguments,
    data,
    doctor,
    evaluate,
    export,
    report,
    run,
    runs,
    teacher,
    train,
    watch,
)
from fastdisco.common import files, launch
from fastdisco.common.console import escape_what_cannot_be_shown, refuse
from fastdisco.common.errors import UserError

# In the order of a user's work.
GROUPS = {
    "data": data,
    "doctor": doctor,
    "train": train,
    "run": run,
    "runs": runs,
    "watch": watch,
    "teacher": teacher,
    "eval": evaluate,
    "export": export,
    "report": report,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 where a user's error stopped it, 3 where an
    exported file lost too much accuracy, or 75 where a signal stopped it and the same command
    continues."""
    escape_what_cannot_be_shown()
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(argv)
    if not argv:
        parser.print_help()
        return 0
    args = arguments.parse(parser, argv)
    try:
        _alone(args)
        with files.refused():
            return args.run(args) or 0
    except UserError as e:
        return refuse(e)


def _alone(args: argparse.Namespace) -> None:
    """Commands that are one process take no notice of a launcher's variables, which may be left over
    in the shell: torch would look for the other ranks."""
    if args.run in (doctor.run, train.run, teacher.record, evaluate.measure):
        return
    if told := launch.alone():
        names = " and ".join(told)
        print(f"fastdisco: this command is one process; {names} not read", file=sys.stderr)


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdisco",
        usage="fastdisco [-h] [--version] COMMAND ...",
        description="Trains small vision models by DisCo's self-supervised distillation.",
        epilog=f"commands:\n{_commands()}\n\nfastdisco COMMAND --help says what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastdisco {__version__}")
    # It passes its argument before the command: `deepspeed --no_python fastdisco train ...`.
    arguments.launched(parser)
    parser.set_defaults(parser=parser)
    groups = parser.add_subparsers(
        prog="fastdisco", required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    for name, group in GROUPS.items():
        p = groups.add_parser(name, description=group.__doc__)
        # Of the others nothing is asked, and their defaults would have to be imported.
        if name in argv:
            group.add(p)
    return parser


def _commands() -> str:
    """One line for each command."""
    lines = {
        f"{name} {command}".strip(): what
        for name, group in GROUPS.items()
        for command, what in group.COMMANDS.items()
    }
    return "\n".join(f"  {name:<16}{what}" for name, what in lines.items())


if __name__ == "__main__":
    sys.exit(main())
