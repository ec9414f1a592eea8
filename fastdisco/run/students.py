"""A student in training with what belongs to it alone: engine, mean student, method, optimizer."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdisco import config, data, engine, methods, models, teacher
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.config import Config
from fastdisco.data import Listing, TrainLoader
from fastdisco.engine import compiled, cudagraph, optim
from fastdisco.methods import Method, Nets, Progress
from fastdisco.models import Out


class TrainState(NamedTuple):
    name: str  # '' where there is one
    cfg: Config  # as it would have it alone
    net: models.Net
    engine: nn.Module  # around it
    ema: models.Net | None
    mean: Callable[[list[Tensor]], Out] | None  # the mean student as it is called
    prototypes: Callable[[Tensor], Tensor] | None
    method: Method
    optimizer: torch.optim.Optimizer
    lr: float  # before the schedule
    size: int  # weights, whole at any ZeRO stage

    def nets(self, targets) -> Nets:
        """What the method calls; targets: the teacher, of one batch."""
        return Nets(self.engine, self.mean, targets, self.prototypes)


def create(name: str, cfg: Config, micro: int, device: torch.device) -> TrainState:
    """A student from its configuration, its weights the same on every rank; micro: images a rank
    and forward."""
    torch.manual_seed(cfg.run.seed)
    shuffle = cfg.bn.shuffle if dist.world() * cfg.bn.groups > 1 else "off"
    method = methods.create(
        cfg.method.name, cfg=cfg.method, dim=cfg.student.dim, seed=cfg.run.seed, shuffle=shuffle
    ).to(device)
    net = models.of(cfg, train=True).to(device)
    size = models.size(net)
    # Before the engine hooks into the net's forward.
    ema = None if method.momentum(Progress(0, 0.0)) is None else models.ema_copy(net)
    lr = optim.base_lr(cfg.optim, cfg.data.batch)
    optimizer = optim.create(net, cfg.optim, lr, cfg.engine.stage)
    student = engine.create(
        net,
        optimizer,
        cfg.engine,
        micro,
        cfg.data.accumulate,
        0.0 if cfg.optim.clip_each else cfg.optim.clip,
    )
    if ema and cfg.engine.stage == 0:
        ema.to(memory_format=torch.channels_last)  # as the engine has the net
    mean, prototypes = (m and inference(m, cfg, device) for m in (ema, net.prototypes))
    return TrainState(name, cfg, net, student, ema, mean, prototypes, method, optimizer, lr, size)


def loader(
    cfg: Config, listing: Listing, micro: int, device: torch.device, permuted: bool = False
) -> TrainLoader:
    """What the training reads, and what its teacher is recorded on; permuted: as of
    methods.Method."""
    return TrainLoader(
        listing,
        config.crops(cfg),
        micro,
        cfg.run.seed,
        cfg.run.epochs,
        cfg.data.accumulate,
        cfg.data.threads,
        device,
        placement=data.place(cfg.data, device, cfg.engine.precision),
        rounds=teacher.rounds(cfg.teacher),
        permuted=permuted,
    )


def once(targets: Callable[[list[Tensor]], Out]) -> Callable[[list[Tensor]], Out]:
    """The teacher for one batch: what several students ask is computed once."""
    known = {}

    def call(views):
        key = tuple(map(id, views))
        if key not in known:
            known[key] = targets(views)
        return known[key]

    return call


def prepare(states: list[TrainState], targets, loader: TrainLoader) -> list[TrainState]:
    """Compiles and captures what the configuration asks for, on noise: before there is a data
    pipeline, for where one of its threads waits for the GPU, a capture breaks.  Nothing that
    training reads changes.  targets: the teacher, or None."""
    perf, device = states[0].cfg.perf, loader.device
    # Recorded embeddings have nothing to prepare.
    live = targets if isinstance(targets, teacher.Teacher) else None
    graphs = perf.graphs and device.type == "cuda"
    if not (graphs or perf.compile):
        return states
    g, dtype = (
        torch.Generator().manual_seed(0),
        torch.float16 if loader.placement.half else torch.float32,
    )
    views = [
        torch.randn(loader.batch, 3, c.size, c.size, generator=g).to(
            device, dtype, memory_format=torch.channels_last
        )
        for c in loader.crops
    ]
    if perf.compile in ("student", "both"):
        for p in states:
            with engine.autocast(p.cfg.engine.precision, device):
                compiled.compile(
                    p.name or "student",
                    p.net,
                    lambda: compiled.forward_backward(p.net, views),
                    perf.backend,
                )
    if perf.compile in ("teacher", "both") and live:
        compiled.compile(
            "teacher",
            live.net,
            lambda: live.eager(views[: states[0].method.teacher_views]),
            perf.backend,
        )
    if graphs:
        # A collective in each norm, and graphs hold none.
        together = states[0].cfg.bn.sync and dist.world() > 1
        if together:
            say(
                "mean student: runs eagerly, not as a CUDA graph: bn.sync exchanges statistics "
                "between the ranks in its forward"
            )
        states = [
            p
            if together
            else p._replace(
                mean=p.ema and cudagraph.Graphed("mean student", p.mean, p.ema.buffers())
            )
            for p in states
        ]
        replayed = lambda v: Out(
            torch.ones(len(v), loader.batch, states[0].cfg.student.dim, device=device)
        )
        for p in states:
            with torch.random.fork_rng(devices=[]):
                stand_in = copy.deepcopy(p.ema) if p.ema else models.of(p.cfg, train=True)
            stand_in.to(device)
            if p.cfg.engine.stage == 0:
                # As the engine has the net: cuDNN looks for algorithms in this forward.
                stand_in.to(memory_format=torch.channels_last)
            rehearse(
                p.nets(live or (targets and replayed))._replace(
                    student=inference(stand_in, p.cfg, device)
                ),
                p.ema,
                p.method,
                views,
            )
    return states


def rehearse(nets: Nets, ema: models.Net | None, method: Method, views: list[Tensor]):
    """One step of a copy of the method, so that teacher and mean student are called with what
    training will call them with."""
    with cudagraph.rehearsal(*([ema] if ema else [])), torch.no_grad():
        copy.deepcopy(method).step(nets, views, Progress(0, 0.0))


def inference(net: nn.Module, cfg: Config, device: torch.device) -> Callable:
    """The network as a callable without gradient, in the precision of the forward passes."""

    def call(x):
        with torch.no_grad(), engine.autocast(cfg.engine.precision, device, cache=False):
            return net(x)

    return call
