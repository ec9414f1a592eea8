"""Trains a student with DisCo, or resumes the run of the same command."""

import argparse
from collections.abc import Sequence

from fastdisco.commands import arguments
from fastdisco.common import attempt, files, launch
from fastdisco.common.console import escape_what_cannot_be_shown, refuse, say
from fastdisco.common.errors import UserError

COMMANDS = {"": "train a student, or go on with the run of the same command"}


def main(argv: list[str] | None = None) -> int:
    """`python fastdisco/train.py`; returns the exit code: 0 finished, 2 refused by a user's error,
    75 stopped by a signal, to be started again."""
    escape_what_cannot_be_shown()
    try:
        args = parsed(argv)
        with files.refused():
            return run(args)
    except UserError as e:
        return refuse(e)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a training; exits with 2 at wrong ones."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    add(parser)
    return arguments.parse(parser, argv)


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco train`."""
    parser.add_argument("--config", required=True, help="a YAML file, see configs/")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--overwrite", action="store_true", help="start over, deleting the run's folder"
    )
    either.add_argument(
        "--dry-run",
        action="store_true",
        help="say what the run would be and what it lacks, and start nothing",
    )
    arguments.launched(parser)
    arguments.overrides(parser, "for example optim.lr=0.06")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Trains, and tells a supervisor of it."""
    attempt.at(-1)
    try:
        with files.refused():
            code = _run(args)
    except UserError:
        attempt.ended(2)
        raise
    attempt.ended(code)
    return code


def _run(args: argparse.Namespace) -> int:
    """Reads the configuration before torch is imported, so that a wrong key is answered at once."""
    from fastdisco import config

    if args.dry_run:
        launch.adopt()
    else:
        launch.follow()
        launch.defaults()
    cfg = config.load(args.config, args.overrides)
    if args.dry_run:
        from fastdisco.run import plan
        from fastdisco.run.folder import agree

        for line in plan.lines(cfg, launch.world(), agree(cfg)):
            say(line)
        return 0
    from fastdisco.train import train

    return 0 if train(cfg, args.overwrite) else launch.STOPPED
