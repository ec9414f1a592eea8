"""Trains on all GPUs of this machine under a supervisor, which starts a training that has crashed
again from its last checkpoint."""

import argparse

from fastdisco.commands import train
from fastdisco.common.errors import UserError

COMMANDS = {"": "train on every GPU, and go on after a crash"}


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco run`."""
    parser.usage = "fastdisco run [-h] [options] -- --config FILE [block.key=value ...]"
    parser.add_argument(
        "--restarts",
        type=_count,
        default=100,
        metavar="N",
        help="how often a training that crashed is started again (default: 100)",
    )
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument(
        "--ranks",
        type=_count,
        metavar="N",
        help="processes at most (default: one for each GPU, or one)",
    )
    parser.add_argument(
        "training", nargs=argparse.REMAINDER, metavar="-- ...", help="what `fastdisco train` takes"
    )
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Reads the configuration first, so that a mistake is answered before anything starts."""
    from fastdisco import config
    from fastdisco.run.supervisor import Supervisor

    words = args.training[1:] if args.training[:1] == ["--"] else args.training
    own = train.parsed(words)
    if own.dry_run:
        raise UserError("--dry-run: starts nothing; use fastdisco train --dry-run")
    cfg = config.load(own.config, own.overrides)
    words = ["--config", own.config, *own.overrides]
    supervisor = Supervisor(cfg, words, own.overwrite, args.launcher, args.restarts, args.ranks)
    return supervisor.run()


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return int(text)
