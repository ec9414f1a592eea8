"""Looks at a teacher's checkpoint before a training, and records its embeddings."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdisco.commands import arguments
from fastdisco.common import launch
from fastdisco.common.console import say, shorten
from fastdisco.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fastdisco.config import Config
    from fastdisco.data import Listing
    from fastdisco.models import Net
    from fastdisco.teacher.formats import Source

COMMANDS = {
    "show": "what a checkpoint is, and what of it is used",
    "check": "kNN accuracy of a teacher: whether it has learned anything",
    "record": "run the teacher once and keep its embeddings, for trainings with teacher.cache=replay",
}


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco teacher`."""
    sub = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    known = {"parents": [_checkpoint()]}
    what = f"{COMMANDS['show']}; exit code 2 if it is no teacher"
    p = arguments.command(sub, "show", what, show, **known)
    p.add_argument(
        "--sha256", action="store_true", help="also the file's SHA-256, for teacher.sha256"
    )
    what = f"{COMMANDS['check']}; exit code 2 if it has not"
    _add_check(arguments.command(sub, "check", what, check, **known))
    what = (
        f"{COMMANDS['record']}; starts under torchrun or deepspeed too, and goes on where it was "
        "stopped"
    )
    p = arguments.command(sub, "record", what, record)
    p.add_argument("--config", required=True, help="of the training")
    arguments.launched(p)
    arguments.overrides(p, "those of the training")


def _checkpoint() -> argparse.ArgumentParser:
    """The arguments that name a checkpoint."""
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
        "--student", metavar="NAME", help="the name of one, for a run that has several"
    )
    return known


def _add_check(p: argparse.ArgumentParser) -> None:
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
    of_data = {
        "--resize": ("eval_resize", "of the short side (%(default)s)"),
        "--size": ("eval_size", "of the centre crop (%(default)s)"),
        "--batch": ("eval_batch", "images at a time (%(default)s)"),
        "--threads": ("threads", "of the CPU, to read images (%(default)s)"),
    }
    for option, (key, what) in of_data.items():
        p.add_argument(option, type=int, default=_default(key), help=what)


def show(args: argparse.Namespace) -> None:
    """`fastdisco teacher show`."""
    from torch import nn

    from fastdisco import models
    from fastdisco.teacher import formats, runtime

    def count(m: nn.Module) -> str:
        return f"{models.size(m) / 1e6:.2f} M weights"

    found = formats.read(args.file, args.arch, student=args.student)
    arch = f"{found.arch} {found.kwargs or ''}".rstrip()
    say(f"{args.file}: {found.format}")
    say(f"architecture  {arch}, {count(found.net.backbone)}")
    say(f"head          {found.head}, {count(found.net.head)}; student.dim must be {found.dim}")
    say(f"used          {len(found.net.state_dict())} tensors, all that the network has")
    for why, names in found.ignored.items():
        say(f"ignored       {why}: {shorten(names)}")
    say(f"fingerprint   {runtime.fingerprint(found.net)}")
    if args.sha256:
        say(f"sha256        {formats.sha256(args.file)}")


def check(args: argparse.Namespace) -> None:
    """`fastdisco teacher check`."""
    import torch

    from fastdisco import data
    from fastdisco.common import dist
    from fastdisco.evals import probe
    from fastdisco.teacher import formats, runtime

    quarantine, device = _default("quarantine"), dist.device()
    found = formats.read(args.file, args.arch, student=args.student)
    val = data.listing(args.data, quarantine)
    # Whether it takes images of that size is known before any is read.
    runtime.of_noise(found.net, runtime.noise((args.size,)))
    train = data.listing(args.bank, quarantine) if args.bank else val
    data.same_classes(train, val)
    if args.bank:
        data.apart(train, val, "give --bank other images, or leave it out")
    bank, queries = _drawn(train, val, args)

    def loader(listing: data.Listing, indices: "np.ndarray") -> data.EvalLoader:
        order = data.reading_order(listing, indices)
        return data.EvalLoader(
            listing, args.resize, args.size, args.batch, args.threads, device, order
        )

    others = f"of {args.bank}" if args.bank else "others"
    say(
        f"{args.file}: {found.arch}; {len(queries)} images of {args.data}, their neighbours among "
        f"{len(bank)} {others}"
    )
    lengths: list[torch.Tensor] = []
    found.net.head.register_forward_hook(
        lambda _module, _input, t: lengths.append(t.float().norm(dim=-1))
    )
    shares = probe.run(
        found.net.eval().to(device),
        _untrained(found).eval().to(device),
        loader(train, bank),
        loader(val, queries),
        len(val.classes),
    )
    std, mean = torch.std_mean(torch.cat(lengths), correction=0)
    say(
        f"length of its embeddings: {mean:.4g} on average, standard deviation {std:.4g}; so much "
        "harder does method.target=published pull on SwAV (docs/method.md)"
    )
    print(json.dumps({f"teacher/{k}": v for k, v in shares.items()}))
    if against := probe.verdict(shares, len(queries)):
        raise UserError(
            f"{args.file}: {against}; do not train with it: it is untrained or broken, "
            "or these images are too few or too easy to tell"
        )


def _untrained(found: "Source") -> "Net":
    """The teacher's architecture with random weights, always the same."""
    import torch

    from fastdisco import models

    torch.manual_seed(0)
    return models.create(found.arch, lambda features: torch.nn.Identity(), dict(found.kwargs))


def _drawn(
    train: "Listing", val: "Listing", args: argparse.Namespace
) -> "tuple[np.ndarray, np.ndarray]":
    """Indices, ascending, of the bank in train and of the queries in val: args.images of each at
    most."""
    import numpy as np

    draw = np.random.default_rng(0)
    if args.bank:
        bank, queries = train.kept, val.kept
    else:
        # Alternate images: whether sorted by class or mixed, both halves are alike.
        bank, queries = val.kept[::2], val.kept[1::2]
    bank, queries = (np.sort(draw.permutation(x)[: args.images]) for x in (bank, queries))
    if not len(bank) or not len(queries):
        raise UserError(
            f"{args.data}: {len(queries)} images to ask and {len(bank)} to answer are too few; "
            "give more, or a larger --images"
        )
    return bank, queries


def record(args: argparse.Namespace) -> None:
    """`fastdisco teacher record`."""
    from fastdisco import config

    launch.follow()
    launch.defaults()
    cfg = config.load(args.config, [*args.overrides, "teacher.cache=record"])

    from fastdisco import engine
    from fastdisco.run import agreement

    device = engine.start(cfg.engine)
    with agreement.together():
        agreement.same_settings(cfg)
        _record(cfg, device)
    engine.stop()


def _record(cfg: "Config", device: "torch.device") -> None:
    from fastdisco import config, data, methods, teacher
    from fastdisco.common import dist
    from fastdisco.run import students

    listing = data.listing(cfg.data.train, cfg.data.quarantine, images=cfg.data)
    loader = students.loader(cfg, listing, config.micro_batch(cfg, dist.world()), device)
    views = methods.kind(cfg.method.name).teacher_views
    assert cfg.teacher, "teacher.cache has made the block"
    cached = teacher.create(
        cfg.teacher, cfg.student.dim, cfg.engine.precision, loader, teacher_views=views
    )
    assert isinstance(cached, teacher.CachedTeacher)
    cached.complete()


def _default(key: str) -> Any:
    """The default of a key of the `data` block."""
    from fastdisco import config

    return config.Data.model_fields[key].default
