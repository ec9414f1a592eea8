"""The command `fastdisco`: data sets and evaluations."""
import argparse
import json
import sys
from pathlib import Path

import torch

from fastdisco import data, dist, engine, models
from fastdisco.config import UserError
from fastdisco.data import check, demo, pack
from fastdisco.evals import knn
from fastdisco.log import say


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastdisco")
    groups = parser.add_subparsers(required=True)

    sub = groups.add_parser("data", help="make and check data sets").add_subparsers(required=True)
    p = sub.add_parser("demo", help="class folders of patches from photographs that scikit-image and scikit-learn ship")
    p.add_argument("dst", type=Path)
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=_demo)
    p = sub.add_parser("pack", help="WebDataset tars in random order, with index and manifest")
    p.add_argument("src", type=Path, help="class folders, a list file, tars, or cifar-10-python.tar.gz or cifar-100-python.tar.gz")
    p.add_argument("dst", type=Path)
    p.add_argument("--seed", type=int, default=0, help="of the order")
    p.add_argument("--shard-mb", type=float, default=pack.SHARD_MB, metavar="MIB", help="size of a tar at most (%(default)s)")
    p.add_argument("--jpeg", type=int, choices=range(1, 101), metavar="QUALITY", help="encode CIFAR's images as JPEG instead of PNG")
    p.set_defaults(run=_pack)
    p = sub.add_parser("check", help="find images and tars that a training cannot read; exit code 2 if there are any")
    p.add_argument("src", type=Path, nargs="+", help="a data set, as data.train takes it; several, as train and val, must have the same classes")
    p.add_argument("--fast", action="store_true", help="look at headers and ends only")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="write quarantine.txt and the report there, not beside the data")
    p.add_argument("--threads", type=int, help="one per core")
    p.add_argument("--max-pixels", type=int, default=check.MAX_PIXELS, help="width x height of an image at most (%(default)s)")
    p.add_argument("--only", nargs="+", metavar="NAME", help="look at these images, named relative to the data's folder")
    p.set_defaults(run=_check)

    sub = groups.add_parser("eval", help="evaluate a run").add_subparsers(required=True)
    p = sub.add_parser("knn", help="weighted kNN accuracy of the last checkpoint, by the run's own configuration")
    p.add_argument("folder", type=Path, metavar="RUN", help="the run's folder, or one of its checkpoints/step_XXXXXXXX")
    p.add_argument("--net", choices=("student", "ema"), default="student")
    p.add_argument("--student", metavar="NAME", help="which one, where the run has several students")
    p.add_argument("overrides", nargs="*", metavar="block.key=value", help="for example eval.k=200 data.val=/data/other")
    p.set_defaults(run=_knn)

    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except UserError as e:
        print(f"fastdisco: error: {e}", file=sys.stderr)
        return 2


def _demo(args):
    demo.write(args.dst, seed=args.seed)


def _pack(args):
    for folder, m in pack.pack(args.src, args.dst, args.seed, args.shard_mb, args.jpeg).items():
        say(f"{folder}: {m['samples']} images of {len(m['classes'])} classes in {len(m['tars'])} tars, {m['bytes'] / 2**20:.1f} MiB")


def _check(args):
    devices = {torch.device("cpu"), dist.device()}
    return 2 * bool(check.check(args.src, args.fast, args.out, args.threads, args.max_pixels, args.only, tuple(devices)))


@torch.no_grad()
def _knn(args):
    net, cfg = models.from_run(args.folder, args.net, args.overrides, args.student)
    if cfg.data.val is None:
        raise UserError(f"{args.folder}: was trained without a validation folder; give one as data.val=FOLDER")
    device = dist.device()
    encode = engine.autocast(cfg.engine.precision, device)(net.to(device).features)
    train, val = (data.listing(path, cfg.data.quarantine) for path in (cfg.data.train, cfg.data.val))
    scores = knn.score(encode, train, val, cfg.data, cfg.view, cfg.eval, cfg.run.seed, device)
    print(json.dumps({f"eval/{k}": v for k, v in scores.items()}))


if __name__ == "__main__":
    sys.exit(main())
