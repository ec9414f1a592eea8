"""Every table and figure of the paper's appendix in miniature, on CIFAR-10 at 32 px.

    python bench/paper.py cifar10.tar.xz
        trains and evaluates everything for one seed; a call that was stopped or killed goes on
    python bench/paper.py cifar10.tar.xz --minutes 60 --only table2 --seeds 0 1
        a part of it, and for an hour
    python bench/paper.py cifar10.tar.xz --minutes 0 --seeds 0 1 --keep
        trains nothing: writes what is finished to bench/results/paper-<device>.json and .png

Small students and teachers are trained here by the real command.  A teacher's embeddings are
recorded once and replayed.  All arms of a table share every setting but the distillation term.
Linear accuracy (logistic regression, its penalty chosen on training images held out) and kNN are
those of the last step on the test split, by which nothing was chosen.  docs/miniature.md has the
results."""

import argparse
import sys
import time
from pathlib import Path

from appendix import collect
from appendix.pages import tables
from appendix.plan import ALL
from appendix.processes import Processes
from appendix.rows import summary
from appendix.settings import SIZES
from appendix.training import Lab
from comparison.plan import images, paths
from harness import finish, parser
from harness.results import device_kind

from fastdisco import config
from fastdisco.data import demo


def main(argv: list[str] | None = None) -> list[dict]:
    """The rows, also of what is not finished."""
    args = arguments(argv)
    state, end = args.state.resolve(), time.monotonic() + 60 * args.minutes
    state.mkdir(parents=True, exist_ok=True)
    lab = Lab(state, paths(images(args.data, state)), Processes(state, end))
    size, only = SIZES[args.size], [name for name in ALL if name in args.only]
    found = collect.carried_out(lab, size, args.seeds, only, other(args, state))
    samples = found._asdict()
    lacking = samples.pop("missing")
    for name, why in lacking.items():
        print(f"missing: {name}: {why}")
    rows = summary(samples)
    used = args.transfer.name if args.transfer else "patches of photographs"
    about = dict(size=args.size, seeds=args.seeds, data=args.data.name, transfer=used)
    about["tables"] = tables(samples)
    folder = None if args.keep else state / "results"
    finish("paper", device_kind(), rows, samples, folder, **about)
    return rows


def other(args: argparse.Namespace, state: Path) -> list[str]:
    """Overrides that name figure 2's data set: the one that the user gave, or photo patches."""
    if args.transfer is None:
        demo.write(state / "patches")
        folder = state / "patches"
        return [f"transfer.train={folder}/train", f"transfer.val={folder}/val"]
    given = args.transfer.resolve()
    if given.is_file():
        return [f"transfer.train={given}"]
    return [f"transfer.{k}={v}" for k, v in paths(given).items()]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add("data", type=Path, help="CIFAR-10: a folder with train/ and test/ or val/, or a tar of one")
    add(
        "--minutes",
        type=float,
        default=1e9,
        help="end this call by then; the next one goes on; 0: train nothing",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="of the students; teachers have one")
    add("--only", nargs="+", choices=ALL, default=list(ALL), help=" ".join(ALL), metavar="WHAT")
    add(
        "--transfer",
        type=Path,
        metavar="DATA",
        help="figure 2's data set: CIFAR-100's python archive, or a folder like that of DATA; by "
        "default patches of photographs (fastdisco data demo)",
    )
    add("--state", type=Path, default=Path("out/paper"), help="where everything is kept")
    add("--size", choices=SIZES, default="cpu", help="networks' lengths (%(default)s)")
    add("--keep", action="store_true", help="write bench/results/paper-<device>.json")
    return options.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except config.UserError as e:
        sys.exit(f"fastdisco: error: {e}")
