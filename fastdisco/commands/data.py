"""Makes, packs and checks data sets."""

import argparse
from pathlib import Path

from fastdisco.commands import arguments
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.common.limits import MAX_PIXELS, SHARD_MB

COMMANDS = {
    "demo": "make a small data set from photographs that scikit-image and scikit-learn ship",
    "pack": "pack a data set into WebDataset tars in random order, with index and manifest",
    "check": "find images and tars that a training cannot read",
}


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco data`."""
    sub = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    _add_demo(arguments.command(sub, "demo", COMMANDS["demo"], demo))
    _add_pack(arguments.command(sub, "pack", COMMANDS["pack"], pack))
    what = f"{COMMANDS['check']}; exit code 2 if there are any"
    _add_check(arguments.command(sub, "check", what, check))


def _add_demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("dst", type=Path)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--light",
        type=float,
        default=0.0,
        metavar="DEVIATION",
        help="each image in a random light of its own: deviation of the logarithm of its brightness "
        "(%(default)s)",
    )


def _add_pack(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "src",
        type=Path,
        help="class folders, a list file, tars, or cifar-10-python.tar.gz or cifar-100-python.tar.gz",
    )
    p.add_argument("dst", type=Path)
    p.add_argument("--seed", type=int, default=0, help="of the order")
    p.add_argument(
        "--shard-mb",
        type=float,
        default=SHARD_MB,
        metavar="MIB",
        help="size of a tar at most (%(default)s)",
    )
    p.add_argument(
        "--jpeg",
        type=int,
        choices=range(1, 101),
        metavar="QUALITY",
        help="encode CIFAR's images as JPEG, not PNG",
    )


def _add_check(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "src",
        type=Path,
        nargs="+",
        help="data sets, as data.train takes them; several must have the same classes",
    )
    p.add_argument("--fast", action="store_true", help="look at headers and ends only")
    p.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write quarantine.txt and the report there, not beside the data",
    )
    p.add_argument("--threads", type=int, help="one per core")
    p.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        help="width x height of an image at most (%(default)s)",
    )
    p.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="look at these images, named relative to the data's folder",
    )


def demo(args: argparse.Namespace) -> None:
    """`fastdisco data demo`."""
    from fastdisco.data import demo

    # So written that nan fails, too.
    if not 0 <= args.light <= 2:
        raise UserError(f"--light: is {args.light:g}; give 0 to 2")
    demo.write(args.dst, seed=args.seed, light=args.light)


def pack(args: argparse.Namespace) -> None:
    """`fastdisco data pack`."""
    from fastdisco.data import pack

    for folder, m in pack.pack(args.src, args.dst, args.seed, args.shard_mb, args.jpeg).items():
        say(
            f"{folder}: {m['samples']} images of {len(m['classes'])} classes in {len(m['tars'])} "
            f"tars, {m['bytes'] / 2**20:.1f} MiB"
        )


def check(args: argparse.Namespace) -> int:
    """`fastdisco data check`."""
    import torch

    from fastdisco.common import dist
    from fastdisco.data import check

    # Decoders differ: an image that one of them reads may stop the other.
    devices = tuple({torch.device("cpu"), dist.device()})
    faults = check.check(
        args.src, args.fast, args.out, args.threads, args.max_pixels, args.only, devices
    )
    return 2 if faults else 0
