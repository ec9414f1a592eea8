"""Evaluates a run."""

import argparse
import json
from pathlib import Path

from fastdisco.commands import arguments
from fastdisco.common.errors import UserError

COMMANDS = {"knn": "kNN accuracy of a run's last checkpoint, by the run's own configuration"}


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco eval`."""
    sub = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    p = arguments.command(sub, "knn", COMMANDS["knn"], knn)
    p.add_argument(
        "folder",
        type=Path,
        metavar="RUN",
        help="the run's folder, or one of its checkpoints/step_XXXXXXXX",
    )
    p.add_argument(
        "--net", choices=("student", "ema"), default="student", help="ema: the mean student"
    )
    p.add_argument("--student", metavar="NAME", help="the name of one, for a run that has several")
    arguments.overrides(p, "for example eval.k=200 data.val=/data/other")


def knn(args: argparse.Namespace) -> None:
    """`fastdisco eval knn`."""
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
    train = data.listing(cfg.data.train, cfg.data.quarantine)
    val = data.listing(cfg.data.val, cfg.data.quarantine)
    data.apart(train, val)
    with torch.no_grad():
        scores = knn.score(encode, train, val, cfg.data, cfg.view, cfg.eval, cfg.run.seed, device)
    print(json.dumps({f"eval/{k}": v for k, v in scores.items()}))
