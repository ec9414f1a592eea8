"""The command `fastdisco`: data sets, teachers and evaluations."""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from fastdisco import config, data, engine, methods, models, teacher
from fastdisco.common import dist
from fastdisco.run import students as pupils
from fastdisco.config import UserError
from fastdisco.data import check, demo, pack
from fastdisco.evals import knn, probe
from fastdisco.common.console import refuse, say, shorten
from fastdisco.teacher import formats, runtime


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

    sub = groups.add_parser("teacher", help="look at a teacher's checkpoint before a training").add_subparsers(required=True)
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("file", type=Path, help="a checkpoint as its training wrote it, or the folder of a run, see docs/teachers.md")
    known.add_argument("--arch", help="the timm model that it belongs to, where the file does not tell")
    known.add_argument("--student", metavar="NAME", help="which one, of a run that has several students")
    p = sub.add_parser("show", parents=[known], help="what the file is, and what of it is used; exit code 2 if it is no teacher")
    p.set_defaults(run=_show)
    p = sub.add_parser("check", parents=[known], help="its kNN accuracy; exit code 2 if that shows no training")
    p.add_argument("--data", type=Path, required=True, metavar="VAL", help="a data set with classes, as data.val takes it")
    p.add_argument("--bank", type=Path, metavar="TRAIN", help="where neighbours are looked for; without it one half of VAL, for the other half")
    p.add_argument("--images", type=int, default=20000, metavar="N", help="of either at most, drawn (%(default)s)")
    p.add_argument("--resize", type=int, default=_default("eval_resize"), help="of the short side (%(default)s)")
    p.add_argument("--size", type=int, default=_default("eval_size"), help="of the centre crop (%(default)s)")
    p.add_argument("--batch", type=int, default=_default("eval_batch"))
    p.add_argument("--threads", type=int, default=_default("threads"))
    p.set_defaults(run=_probe)
    p = sub.add_parser("record", help="run the teacher once over teacher.cache_rounds epochs of views, for trainings with teacher.cache=replay; "
                       "starts under torchrun or deepspeed too, and goes on where it was stopped")
    p.add_argument("--config", required=True, help="of the training")
    p.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    p.add_argument("overrides", nargs="*", metavar="block.key=value", help="those of the training")
    p.set_defaults(run=_record)

    sub = groups.add_parser("eval", help="evaluate a run").add_subparsers(required=True)
    p = sub.add_parser("knn", help="weighted kNN accuracy of the last checkpoint, by the run's own configuration")
    p.add_argument("folder", type=Path, metavar="RUN", help="the run's folder, or one of its checkpoints/step_XXXXXXXX")
    p.add_argument("--net", choices=("student", "ema"), default="student")
    p.add_argument("--student", metavar="NAME", help="which one, where the run has several students")
    p.add_argument("overrides", nargs="*", metavar="block.key=value", help="for example eval.k=200 data.val=/data/other")
    p.set_defaults(run=_knn)

    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(x.startswith("-") for x in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes no more of them once an option has stood between
        args.overrides += rest
    try:
        return args.run(args) or 0
    except UserError as e:
        return refuse(e)


def _demo(args):
    demo.write(args.dst, seed=args.seed)


def _pack(args):
    for folder, m in pack.pack(args.src, args.dst, args.seed, args.shard_mb, args.jpeg).items():
        say(f"{folder}: {m['samples']} images of {len(m['classes'])} classes in {len(m['tars'])} tars, {m['bytes'] / 2**20:.1f} MiB")


def _check(args):
    devices = {torch.device("cpu"), dist.device()}
    return 2 * bool(check.check(args.src, args.fast, args.out, args.threads, args.max_pixels, args.only, tuple(devices)))


def _show(args):
    found = formats.read(args.file, args.arch, student=args.student)
    count = lambda m: f"{models.size(m) / 1e6:.2f} M weights"  # noqa: E731
    say(f"{args.file}: {found.format}")
    say(f"architecture  {found.arch} {found.kwargs or ''}".rstrip() + f", {count(found.net.backbone)}")
    say(f"head          {found.head}, {count(found.net.head)}; student.dim must be {found.dim}")
    say(f"used          {len(found.net.state_dict())} tensors, all that the network has")
    for why, names in found.ignored.items():
        say(f"ignored       {why}: {shorten(names)}")
    say(f"fingerprint   {runtime.fingerprint(found.net)}")


@torch.no_grad()
def _probe(args):
    quarantine, device, draw = _default("quarantine"), dist.device(), np.random.default_rng(0)
    found, val = formats.read(args.file, args.arch, student=args.student), data.listing(args.data, quarantine)
    runtime.of_noise(found.net, runtime.noise((args.size,)))
    train = data.listing(args.bank, quarantine) if args.bank else val
    data.same_classes(train, val)
    bank, queries = (train.kept, val.kept) if args.bank else (val.kept[::2], val.kept[1::2])  # sorted by class, or mixed: halves alike in both
    bank, queries = (draw.permutation(x)[:args.images] for x in (bank, queries))
    if not len(bank) or not len(queries):
        raise UserError(f"{args.data}: {len(queries)} images to ask and {len(bank)} to answer are too few; give more, or a larger --images")
    loaders = [data.EvalLoader(listing, args.resize, args.size, args.batch, args.threads, device, data.reading_order(listing, np.sort(indices)))
               for listing, indices in ((train, bank), (val, queries))]
    torch.manual_seed(0)
    untrained = models.create(found.arch, lambda features: torch.nn.Identity(), found.kwargs)
    say(f"{args.file}: {found.arch}; {len(queries)} images of {args.data}, their neighbours among {len(bank)} "
        f"{f'of {args.bank}' if args.bank else 'others'}")
    shares = probe.run(*(n.eval().to(device) for n in (found.net, untrained)), *loaders, len(val.classes))
    print(json.dumps({f"teacher/{k}": v for k, v in shares.items()}))
    if against := probe.verdict(shares, len(queries)):
        raise UserError(f"{args.file}: {against}; do not train with it: it is untrained or broken, or these images are too few or too easy to tell")


def _record(args):
    cfg = config.load(args.config, [*args.overrides, "teacher.cache=record"])
    device = engine.start(cfg.engine)
    loader = pupils.loader(cfg, data.listing(cfg.data.train, cfg.data.quarantine), config.micro_batch(cfg, dist.world()), device)
    teacher.create(cfg.teacher, cfg.student.dim, cfg.engine.precision, loader, taught=methods.kind(cfg.method.name).taught).complete()
    engine.stop()


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


def _default(key: str):
    return config.Data.model_fields[key].default


if __name__ == "__main__":
    sys.exit(main())
