"""What a run would be and lack, found without starting it: `train.py --dry-run`.  Networks are made
without memory."""

import math
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdisco import config, data, engine, methods, models
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.common.urls import Url
from fastdisco.config import Config
from fastdisco.data import shards
from fastdisco.engine import compiled, optim
from fastdisco.methods import Progress
from fastdisco.run import following, loggers
from fastdisco.run.remarks import remarks
from fastdisco.teacher import formats, runtime

GIB = 2**30
# A plan is also made on machines without a GPU, for others: NVIDIA's B300 has most.
LARGEST_GPU = 288 * GIB


def lines(cfg: Config, world: int, folder: Path) -> Iterator[str]:
    """The plan for `world` ranks and that output folder, line by line; the last says what is
    missing.

    Data and teacher may be missing.  Existing files are checked exactly as training would check
    them, the teacher with every weight.
    Raises UserError for what the run would refuse: a batch that does not divide, an optimizer or a
    network that cannot be made, a teacher that does not fit."""
    loggers.check(cfg.log.to)
    missing: list[str] = []
    follows = following.followed(cfg, world, following.began(cfg, folder))
    cfg = follows.cfg
    micro = config.micro_batch(cfg, world)
    config.refuse_beyond(cfg, world, _most_memory())
    if cfg.perf.compile:
        compiled.refuse_unknown(cfg.perf.backend)
    lr = optim.base_lr(cfg.optim, cfg.data.batch)
    sizes = [crop.size for crop in config.crops(cfg)]
    crops = ", ".join(f"{sizes.count(s)} x {s}" for s in dict.fromkeys(sizes))
    state = "continues what is there" if (folder / "config.yaml").exists() else "new"
    yield f"run         {folder} by {cfg.method.name}: {state}"
    nets = yield from _students(cfg)
    teacher = yield from _teacher(cfg, missing)
    train = yield from _data(cfg, missing)
    yield (
        f"batch       {cfg.data.batch} = {world} ranks x {micro} images x {cfg.data.accumulate} "
        f"accumulated; crops of {crops} px; lr {lr:.4g}"
    )
    for remark in following.told(follows, nets.values()):
        yield f"remark      {remark}"
    yield f"cost        {cfg.run.epochs} epochs{_steps(cfg, train)}"
    for name, own in config.students(cfg).items():
        yield memory(name, own, nets[name], lr, teacher, sizes, micro, world)
        # One teacher serves all students: it counts with the first.
        teacher = 0
    yield f"missing     {', '.join(missing) or 'nothing'}"


# ---- the parts: each yields its lines and returns what the others need


def _students(cfg: Config) -> Generator[str, None, dict[str, models.Net]]:
    """Returns the networks by name, on the meta device."""
    nets = {}
    for name, own in config.students(cfg).items():
        with torch.device("meta"):
            nets[name] = net = models.of(own, train=True)
        title = f"{name and f'{name}: '}{own.student.arch} {own.student.kwargs or ''}".rstrip()
        parts = ", ".join(
            f"{models.size(m) / 1e6:.2f} M in {part}" for part, m in net.named_children()
        )
        yield f"student     {title}: {models.size(net) / 1e6:.2f} M weights, {parts}"
    return nets


def _teacher(cfg: Config, missing: list[str]) -> Generator[str, None, int]:
    """Returns its number of weights, 0 where that is not known; adds to `missing`."""
    teacher = cfg.teacher
    if teacher is None:
        yield "teacher     none"
        return 0
    if teacher.cache == "replay":
        if not (teacher.cache_folder / "cache.json").exists():
            missing.append(f"teacher.cache_folder {teacher.cache_folder}")
        yield f"teacher     replayed from {teacher.cache_folder}, its file is not needed"
        return 0
    if not teacher.file.exists():
        missing.append(f"teacher.file {teacher.file}")
        arch = teacher.arch or "of an architecture that the file will tell"
        yield f"teacher     {arch}: not found"
        shapes = models.shapes(teacher.arch) if teacher.arch else {}
        return sum(map(math.prod, shapes.values()))
    formats.refuse_other(teacher.file, teacher.sha256)
    found = formats.read(
        teacher.file, teacher.arch, teacher.kwargs, cfg.student.dim, teacher.student
    )
    asked = config.crops(cfg)[: methods.kind(cfg.method.name).teacher_views]
    # Whether it takes images of those sizes and gives an embedding.
    runtime.of_noise(found.net, runtime.noise(tuple(dict.fromkeys(c.size for c in asked))))
    size = models.size(found.net)
    yield f"teacher     {found.arch}: {size / 1e6:.2f} M weights, {found.head}; {found.format}"
    return size


def _data(cfg: Config, missing: list[str]) -> Generator[str, None, data.Listing | None]:
    """Returns the training images, if they are there; adds to `missing`."""
    listings = {}
    for key, path in (("train", cfg.data.train), ("val", cfg.data.val)):
        if path is None:
            yield f"data.{key:<7}none"
            continue
        # A pattern stands for several tars, and no file has its name.
        pattern = any(c in path.name for c in "*?[{")
        if not (path.exists() or pattern or isinstance(path, Url)):
            missing.append(f"data.{key} {path}")
            yield f"data.{key:<7}{path}: not found"
            continue
        listings[key] = x = data.listing(path, cfg.data.quarantine, images=cfg.data)
        yield (
            f"data.{key:<7}{path}: {len(x.kept)} images of {len(x.classes)} classes, "
            f"{len(x.left_out)} left out by the quarantine"
        )
    train, val = (listings.get(key) for key in ("train", "val"))
    if train and val:
        data.same_classes(train, val)
        data.apart(train, val)
    if train:
        for remark in remarks(cfg, train, val):
            yield f"remark      {remark}"
    return train


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
    total = cfg.run.epochs * steps
    return f" x {steps:,} steps = {min(total, cfg.run.max_steps or total):,} steps"


# ---- memory


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
    """The plan's line on the memory of each rank, in float32.

    net      the student, on the meta device
    teacher  its number of weights
    crops    sizes in pixels, one for each view
    Exact for weights, gradients and the optimizer's state at the ZeRO stage.  What the student's
    forward saves for its backward is given at its most, found by a forward on the meta device.
    Queue, data pipeline and the libraries' workspaces are not in it."""
    method = method_of(cfg)
    own = sum(bytes_of(p) for p in net.parameters())
    state = optimizer_bytes(cfg, net, lr, micro)
    ema = 0 if method.momentum(Progress(0, 0.0)) is None else own
    # ZeRO parts the optimizer's state, then gradients, then weights.
    weights, gradients, states = (
        size / (world if cfg.engine.stage >= stage else 1)
        for size, stage in ((own, 3), (own, 2), (state, 1))
    )
    held = weights + gradients + states + ema + 4 * teacher
    views = [torch.empty(micro, 3, size, size, device="meta") for size in crops]
    saved = _saved_bytes(net, views)
    gib = lambda n: f"{n / GIB:.2f}"
    return (
        f"memory      {name and f'{name}: '}{gib(held)} GiB of weights, gradients and states "
        f"(student {gib(own)}, its optimizer {gib(state)}, mean student {gib(ema)}, teacher "
        f"{gib(4 * teacher)}) and at most {gib(saved)} GiB saved by the student's forward, on each "
        "rank in fp32"
    )


def method_of(cfg: Config) -> methods.Method:
    """The method on the meta device, for the size of its state."""
    with torch.device("meta"):
        return methods.create(
            cfg.method.name, cfg=cfg.method, dim=cfg.student.dim, seed=cfg.run.seed, shuffle="off"
        )


def _most_memory() -> int:
    """Bytes that a rank may have: here, or where there is no GPU on a machine with the largest."""
    here = engine.memory(dist.device())
    return here if torch.cuda.is_available() else max(here, LARGEST_GPU)


def bytes_of(x: Tensor) -> int:
    """Bytes of a tensor, also on the meta device."""
    return x.numel() * x.element_size()


def optimizer_bytes(cfg: Config, net: nn.Module, lr: float, micro: int) -> int:
    """The tensors that the optimizer keeps for all weights, after a step on the meta device."""
    size, clip = models.size(net), cfg.optim.clip
    # For what it refuses.
    engine.deepspeed_config(cfg.engine, micro, cfg.data.accumulate, clip, size)
    # Whether it works at that ZeRO stage is tried with numbers, which the meta device has not.
    optim.create(nn.Linear(1, 1), cfg.optim, lr, cfg.engine.stage)
    optimizer = optim.create(net, cfg.optim, lr)
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    kept = (x for state in optimizer.state.values() for x in state.values())
    return sum(bytes_of(x) for x in kept if isinstance(x, Tensor) and x.ndim)


def _saved_bytes(net: nn.Module, views: list[Tensor]) -> int:
    """What a forward saves for its backward besides the network's own tensors; memory that several
    saved tensors share counts once."""
    at = lambda x: x.untyped_storage()._cdata
    own = {at(x) for x in net.state_dict(keep_vars=True).values()}
    saved = {}

    def pack(x: Tensor) -> Tensor:
        if at(x) not in own:
            # The tensor itself is kept, so that no other storage takes its place.
            saved[at(x)] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        net(views)
    return sum(x.untyped_storage().nbytes() for x in saved.values())
