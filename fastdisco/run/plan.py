"""What a run would be and need, found without starting it: `train.py --dry-run`.  Networks are made
without memory."""

import math
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from torch import nn

from fastdisco import config, data, methods, models
from fastdisco.common.errors import UserError
from fastdisco.config import Config
from fastdisco.data import shards
from fastdisco.engine import optim
from fastdisco.methods import Progress
from fastdisco.teacher import formats, runtime

GIB = 2**30


def lines(cfg: Config, world: int, folder: Path) -> Iterator[str]:
    """The plan for `world` ranks and that output folder, line by line; the last says what is
    missing.

    Data and teacher may be missing; what is there is read as the run would read it, the teacher
    with every weight.
    Raises UserError for what the run would refuse: a batch that does not divide, an optimizer or a
    network that cannot be, a teacher that does not fit."""
    missing = []
    micro = config.micro_batch(cfg, world)
    lr = optim.base_lr(cfg.optim, cfg.data.batch)
    crops = [crop.size for crop in config.crops(cfg)]
    yield f"run         {folder} by {cfg.method.name}: {'continues what is there' if (folder / 'config.yaml').exists() else 'new'}"
    nets = yield from _students(cfg)
    teacher = yield from _teacher(cfg, missing)
    train = yield from _data(cfg, missing)
    yield (
        f"batch       {cfg.data.batch} = {world} ranks x {micro} images x {cfg.data.accumulate} "
        "accumulated; crops of "
        f"{', '.join(f'{crops.count(s)} x {s}' for s in dict.fromkeys(crops))} px; lr {lr:.4g}"
    )
    yield f"cost        {cfg.run.epochs} epochs{_steps(cfg, train)}"
    for name, own in config.students(cfg).items():
        yield memory(name, own, nets[name], lr, teacher, crops, micro, world)
        teacher = 0  # there is one for all
    yield f"missing     {', '.join(missing) or 'nothing'}"


def _students(cfg: Config) -> Generator[str, None, dict[str, nn.Module]]:
    """Yields its lines, as the next two do; returns the networks by name."""
    nets = {}
    for name, own in config.students(cfg).items():
        with torch.device("meta"):
            nets[name] = net = models.of(own, train=True)
        parts = ", ".join(
            f"{models.size(m) / 1e6:.2f} M in {part}" for part, m in net.named_children()
        )
        yield (
            f"student     {name and f'{name}: '}{own.student.arch} {own.student.kwargs or ''}".rstrip()
            + f": {models.size(net) / 1e6:.2f} M weights, {parts}"
        )
    return nets


def _teacher(cfg: Config, missing: list[str]) -> Generator[str, None, int]:
    """Returns its number of weights, as far as it is known; adds to what is missing."""
    teacher = 0
    if cfg.teacher is None:
        yield "teacher     none"
    elif cfg.teacher.cache == "replay":
        recorded = cfg.teacher.cache_folder
        if not (recorded / "cache.json").exists():
            missing.append(f"teacher.cache_folder {recorded}")
        yield f"teacher     replayed from {recorded}, its file is not needed"
    elif not cfg.teacher.file.exists():
        missing.append(f"teacher.file {cfg.teacher.file}")
        if cfg.teacher.arch:
            teacher = sum(map(math.prod, models.shapes(cfg.teacher.arch).values()))
        yield f"teacher     {cfg.teacher.arch or 'of an architecture that the file will tell'}: not found"
    else:
        found = formats.read(
            cfg.teacher.file,
            cfg.teacher.arch,
            cfg.teacher.kwargs,
            cfg.student.dim,
            cfg.teacher.student,
        )
        teacher = models.size(found.net)
        taught = config.crops(cfg)[: methods.kind(cfg.method.name).teacher_views]
        runtime.of_noise(
            found.net, runtime.noise(tuple(dict.fromkeys(crop.size for crop in taught)))
        )
        yield f"teacher     {found.arch}: {teacher / 1e6:.2f} M weights, {found.head}; {found.format}"
    return teacher


def _data(cfg: Config, missing: list[str]) -> Generator[str, None, data.Listing | None]:
    """Returns the training images, if they are there; adds to what is missing."""
    listings = {}
    for key, path in (("train", cfg.data.train), ("val", cfg.data.val)):
        if path is None:
            yield f"data.{key:<7}none"
        # Those stand for several tars.
        elif not path.exists() and not any(c in path.name for c in "*?[{"):
            missing.append(f"data.{key} {path}")
            yield f"data.{key:<7}{path}: not found"
        else:
            listings[key] = x = data.listing(path, cfg.data.quarantine)
            yield f"data.{key:<7}{path}: {len(x.kept)} images of {len(x.classes)} classes, {len(x.left_out)} left out by the quarantine"
    if len(listings) == 2:
        data.same_classes(*listings.values())
    return listings.get("train")


def _steps(cfg: Config, train: data.Listing | None) -> str:
    if train is None:
        return "; steps are known when the data is there"
    shards.refuse_sorted(train)
    steps = len(train.kept) // cfg.data.batch
    if not steps:
        raise UserError(
            f"data.batch: {cfg.data.batch} images, but {cfg.data.train} has {len(train.kept)}; "
            "lower it"
        )
    return (
        f" x {steps:,} steps = {min(cfg.run.epochs * steps, cfg.run.max_steps or math.inf):,} steps"
    )


def memory(
    name: str,
    cfg: Config,
    net: nn.Module,
    lr: float,
    teacher: int,
    crops: list[int],
    micro: int,
    world: int,
) -> str:
    """Bytes on each rank in float32: exact for weights, gradients and the optimizer's state at the
    ZeRO stage, the most for what the student's forward saves for its backward, by a forward on the
    meta device; without queue, data pipeline and workspace of libraries."""
    # Whether the optimizer works at that stage is tried with numbers.
    optim.create(nn.Linear(1, 1), cfg.optim, lr, cfg.engine.stage)
    optimizer = optim.create(net, cfg.optim, lr)
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    state = sum(
        x.numel() * x.element_size()
        for s in optimizer.state.values()
        for x in s.values()
        if isinstance(x, torch.Tensor) and x.ndim
    )
    own = sum(p.numel() * p.element_size() for p in net.parameters())
    share = lambda stage: world if cfg.engine.stage >= stage else 1
    with torch.device("meta"):
        method = methods.create(
            cfg.method.name, cfg=cfg.method, dim=cfg.student.dim, seed=cfg.run.seed, shuffle="off"
        )
    ema = 0 if method.momentum(Progress(0, 0.0)) is None else own
    held = own / share(3) + own / share(2) + state / share(1) + ema + 4 * teacher
    at = lambda x: x.untyped_storage()._cdata
    held_anyway, kept = {at(x) for x in net.state_dict(keep_vars=True).values()}, {}

    def pack(x):
        if at(x) not in held_anyway:
            kept[at(x)] = x  # the tensor, so that no other storage takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        net([torch.empty(micro, 3, size, size, device="meta") for size in crops])
    saved = sum(x.untyped_storage().nbytes() for x in kept.values())
    gib = lambda n: f"{n / GIB:.2f}"
    return (
        f"memory      {name and f'{name}: '}{gib(held)} GiB of weights, gradients and states "
        f"(student {gib(own)}, its optimizer {gib(state)}, mean student {gib(ema)}, teacher "
        f"{gib(4 * teacher)}) and at most {gib(saved)} GiB saved by the student's forward, on each "
        "rank in fp32"
    )
