"""Evaluates a run."""

import argparse
import json
from pathlib import Path

from fastdisco.common.errors import UserError

COMMANDS = {"knn": "kNN accuracy of a run's last checkpoint, by the run's own configuration"}


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco eval`."""
    sub = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    p = sub.add_parser("knn", help=COMMANDS["knn"])
    p.add_argument(
        "folder",
        type=Path,
        metavar="RUN",
        help="the run's folder, or one of its checkpoints/step_XXXXXXXX",
    )
    p.add_argument("--net", choices=("student", "ema"), default="student")
    p.add_argument(
        "--student", metavar="NAME", help="which one, where the run has several students"
    )
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="block.key=value",
        help="for example eval.k=200 data.val=/data/other",
    )
    p.set_defaults(run=run_knn)


def run_knn(args: argparse.Namespace) -> None:
    import torch

    from fastdisco import data, models
    from fastdisco.common import dist
    from fastdisco.common.precision import autocast
    from fastdisco.evals import knn

    net, cfg = models.from_run(args.folder, args.net, args.overrides, args.student)
    if cfg.data.val is None:
        raise UserError(
            f"{args.folder}: was trained without a validation folder; give one as data.val=FOLDER"
        )
    device = dist.device()
    encode = autocast(cfg.engine.precision, device)(net.to(device).features)
    train, val = (
        data.listing(path, cfg.data.quarantine) for path in (cfg.data.train, cfg.data.val)
    )
    with torch.no_grad():
        scores = knn.score(encode, train, val, cfg.data, cfg.view, cfg.eval, cfg.run.seed, device)
    print(json.dumps({f"eval/{k}": v for k, v in scores.items()}))
