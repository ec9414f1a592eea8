"""Looks at a teacher's checkpoint before a training, and records its embeddings."""

import argparse
import json
from pathlib import Path

from fastdisco import config
from fastdisco.common.console import say, shorten
from fastdisco.common.errors import UserError

COMMANDS = {
    "show": "what a checkpoint is, and what of it is used",
    "check": "kNN accuracy of a teacher: whether it has learned anything",
    "record": "run the teacher once and keep its embeddings, for trainings with teacher.cache=replay",
}


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco teacher`."""
    sub = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument(
        "file",
        type=Path,
        help="a checkpoint as its training wrote it, or the folder of a run, see docs/teachers.md",
    )
    known.add_argument(
        "--arch", help="the timm model that it belongs to, where the file does not say"
    )
    known.add_argument(
        "--student", metavar="NAME", help="which one, of a run that has several students"
    )

    p = sub.add_parser(
        "show", parents=[known], help=f"{COMMANDS['show']}; exit code 2 if it is no teacher"
    )
    p.set_defaults(run=show)

    p = sub.add_parser(
        "check", parents=[known], help=f"{COMMANDS['check']}; exit code 2 if it has not"
    )
    p.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="VAL",
        help="a data set with classes, as data.val takes it",
    )
    p.add_argument(
        "--bank",
        type=Path,
        metavar="TRAIN",
        help="the kNN bank; without it one half of VAL, for the other half",
    )
    p.add_argument(
        "--images",
        type=int,
        default=20000,
        metavar="N",
        help="of either at most, drawn at random (%(default)s)",
    )
    p.add_argument(
        "--resize",
        type=int,
        default=_default("eval_resize"),
        help="of the short side (%(default)s)",
    )
    p.add_argument(
        "--size", type=int, default=_default("eval_size"), help="of the centre crop (%(default)s)"
    )
    p.add_argument("--batch", type=int, default=_default("eval_batch"))
    p.add_argument("--threads", type=int, default=_default("threads"))
    p.set_defaults(run=check)

    p = sub.add_parser(
        "record",
        help=f"{COMMANDS['record']}; starts under torchrun or deepspeed too, and goes on where it was stopped",
    )
    p.add_argument("--config", required=True, help="of the training")
    # The deepspeed launcher passes it.
    p.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    p.add_argument("overrides", nargs="*", metavar="block.key=value", help="those of the training")
    p.set_defaults(run=record)


def show(args: argparse.Namespace) -> None:
    from fastdisco import models
    from fastdisco.teacher import formats, runtime

    def count(m):
        return f"{models.size(m) / 1e6:.2f} M weights"

    found = formats.read(args.file, args.arch, student=args.student)
    say(f"{args.file}: {found.format}")
    say(
        f"architecture  {found.arch} {found.kwargs or ''}".rstrip()
        + f", {count(found.net.backbone)}"
    )
    say(f"head          {found.head}, {count(found.net.head)}; student.dim must be {found.dim}")
    say(f"used          {len(found.net.state_dict())} tensors, all that the network has")
    for why, names in found.ignored.items():
        say(f"ignored       {why}: {shorten(names)}")
    say(f"fingerprint   {runtime.fingerprint(found.net)}")


def check(args: argparse.Namespace) -> None:
    import torch

    from fastdisco import data, models
    from fastdisco.common import dist
    from fastdisco.evals import probe
    from fastdisco.teacher import formats, runtime

    quarantine, device = _default("quarantine"), dist.device()
    found = formats.read(args.file, args.arch, student=args.student)
    val = data.listing(args.data, quarantine)
    runtime.of_noise(found.net, runtime.noise((args.size,)))
    train = data.listing(args.bank, quarantine) if args.bank else val
    data.same_classes(train, val)
    bank, queries = _drawn(train, val, args)
    loaders = [
        data.EvalLoader(
            listing,
            args.resize,
            args.size,
            args.batch,
            args.threads,
            device,
            data.reading_order(listing, indices),
        )
        for listing, indices in ((train, bank), (val, queries))
    ]
    torch.manual_seed(0)
    untrained = models.create(found.arch, lambda features: torch.nn.Identity(), found.kwargs)
    say(
        f"{args.file}: {found.arch}; {len(queries)} images of {args.data}, their neighbours among "
        f"{len(bank)} {f'of {args.bank}' if args.bank else 'others'}"
    )
    nets = (n.eval().to(device) for n in (found.net, untrained))
    shares = probe.run(*nets, *loaders, len(val.classes))
    print(json.dumps({f"teacher/{k}": v for k, v in shares.items()}))
    if against := probe.verdict(shares, len(queries)):
        raise UserError(
            f"{args.file}: {against}; do not train with it: it is untrained or broken, "
            "or these images are too few or too easy to tell"
        )


def _drawn(train, val, args: argparse.Namespace) -> tuple:
    """Indices, ascending, of the bank in train and of the queries in val: args.images of each at
    most."""
    import numpy as np

    draw = np.random.default_rng(0)
    # Without a bank of its own, alternate images: whether sorted by class or mixed, both halves are
    # alike.
    bank, queries = (train.kept, val.kept) if args.bank else (val.kept[::2], val.kept[1::2])
    bank, queries = (np.sort(draw.permutation(x)[: args.images]) for x in (bank, queries))
    if not len(bank) or not len(queries):
        raise UserError(
            f"{args.data}: {len(queries)} images to ask and {len(bank)} to answer are too few; "
            "give more, or a larger --images"
        )
    return bank, queries


def record(args: argparse.Namespace) -> None:
    cfg = config.load(args.config, [*args.overrides, "teacher.cache=record"])

    from fastdisco import data, engine, methods, teacher
    from fastdisco.common import dist
    from fastdisco.run import students

    device = engine.start(cfg.engine)
    listing = data.listing(cfg.data.train, cfg.data.quarantine)
    loader = students.loader(cfg, listing, config.micro_batch(cfg, dist.world()), device)
    views = methods.kind(cfg.method.name).teacher_views
    teacher.create(
        cfg.teacher, cfg.student.dim, cfg.engine.precision, loader, teacher_views=views
    ).complete()
    engine.stop()


def _default(key: str):
    return config.Data.model_fields[key].default
