"""The command `fastdisco`: data sets and evaluations."""
import argparse
import json
import sys
from pathlib import Path

import torch

from fastdisco import data, dist, engine, models
from fastdisco.config import UserError
from fastdisco.data import demo
from fastdisco.evals import knn


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastdisco")
    groups = parser.add_subparsers(required=True)

    sub = groups.add_parser("data", help="make data sets").add_subparsers(required=True)
    p = sub.add_parser("demo", help="class folders of patches from photographs that scikit-image and scikit-learn ship")
    p.add_argument("dst", type=Path)
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=lambda a: demo.write(a.dst, seed=a.seed))

    sub = groups.add_parser("eval", help="evaluate a run").add_subparsers(required=True)
    p = sub.add_parser("knn", help="weighted kNN accuracy of the last checkpoint, by the run's own configuration")
    p.add_argument("folder", type=Path, metavar="RUN", help="the run's folder, or one of its checkpoints/step_XXXXXXXX")
    p.add_argument("--net", choices=("student", "ema"), default="student")
    p.add_argument("overrides", nargs="*", metavar="block.key=value", help="for example eval.k=200 data.val=/data/other")
    p.set_defaults(run=_knn)

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except UserError as e:
        print(f"fastdisco: error: {e}", file=sys.stderr)
        return 2
    return 0


@torch.no_grad()
def _knn(args):
    net, cfg = models.from_run(args.folder, args.net, args.overrides)
    if cfg.data.val is None:
        raise UserError(f"{args.folder}: was trained without a validation folder; give one as data.val=FOLDER")
    device = dist.device()
    encode = engine.autocast(cfg.engine.precision, device)(net.to(device).features)
    train, val = data.listing(cfg.data.train), data.listing(cfg.data.val)
    scores = knn.score(encode, train, val, cfg.data, cfg.view, cfg.eval, cfg.run.seed, device)
    print(json.dumps({f"eval/{k}": v for k, v in scores.items()}))


if __name__ == "__main__":
    sys.exit(main())
