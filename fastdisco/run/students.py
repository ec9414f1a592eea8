"""A student in training with what belongs to it alone: engine, mean student (EMA), method,
optimizer."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from fastdisco import config, data, engine, methods, models, teacher
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.config import Config
from fastdisco.data import Listing, TrainLoader
from fastdisco.engine import compiled, cudagraph, optim
from fastdisco.methods import Forward, Method, Nets, Progress
from fastdisco.models import Out
from fastdisco.models.syncbn import Synced


class Engine(Protocol):
    """What is used of DeepSpeed's engine."""

    module: models.Net

    def __call__(self, views: list[Tensor]) -> Out: ...

    def backward(self, loss: Tensor) -> Any: ...

    def step(self) -> Any: ...


class TrainState(NamedTuple):
    """One student of a run and what trains it."""

    # '' in a run of one student.
    name: str
    # The configuration that this student would have alone.
    cfg: Config
    net: models.Net
    # DeepSpeed's, around the net.
    engine: Engine
    # The mean student; None for methods without one.
    ema: models.Net | None
    # The two below as a method calls them: without gradient, in the engine's precision.
    ema_forward: Forward | None
    prototypes: Callable[[Tensor], Tensor] | None
    method: Method
    optimizer: torch.optim.Optimizer
    # Before the schedule.
    lr: float
    # Number of weights, also at ZeRO stage 3, where each rank holds a part of them.
    size: int

    def nets(self, targets: Forward | None) -> Nets:
        """The networks that the method calls; targets: the teacher, for one batch."""
        return Nets(self.engine, self.ema_forward, targets, self.prototypes)


# ---- making what a training needs


def create(name: str, cfg: Config, micro: int, device: torch.device) -> TrainState:
    """A student from its configuration, with the same weights on every rank.

    micro: images of a rank in one forward."""
    torch.manual_seed(cfg.run.seed)
    shuffle = cfg.bn.shuffle if dist.world() * cfg.bn.groups > 1 else "off"
    method = methods.create(
        cfg.method.name, cfg=cfg.method, dim=cfg.student.dim, seed=cfg.run.seed, shuffle=shuffle
    ).to(device)
    net = models.of(cfg, train=True).to(device)
    # Before the engine takes the weights apart or hooks into the net's forward.
    size = models.size(net)
    has_ema = method.momentum(Progress(0, 0.0)) is not None
    ema = models.ema_copy(net) if has_ema else None

    lr = optim.base_lr(cfg.optim, cfg.data.batch)
    optimizer = optim.create(net, cfg.optim, lr, cfg.engine.stage)
    # optim.create clips each weight by itself where the configuration asks for that.
    clip = 0.0 if cfg.optim.clip_each else cfg.optim.clip
    student = engine.create(net, optimizer, cfg.engine, micro, cfg.data.accumulate, clip)
    if ema and cfg.engine.stage == 0:
        # As the engine has made the net.
        ema.to(memory_format=torch.channels_last)
    ema_forward = inference(ema, cfg, device) if ema else None
    prototypes = inference(net.prototypes, cfg, device) if net.prototypes else None
    return TrainState(
        name, cfg, net, student, ema, ema_forward, prototypes, method, optimizer, lr, size
    )


def loader(
    cfg: Config, listing: Listing, micro: int, device: torch.device, permuted: bool = False
) -> TrainLoader:
    """The loader of a training; the teacher's embeddings are recorded with the same one.

    permuted: see methods.Method."""
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
        bad_limit=cfg.data.bad_limit,
    )


def once(targets: Forward) -> Forward:
    """The teacher for one batch: views that several students ask about are computed once."""
    known: dict[tuple[int, ...], Out | cudagraph.Later] = {}

    def call(views: list[Tensor]) -> Out | cudagraph.Later:
        # The batch keeps its views alive, so that an id stays that view's.
        key = tuple(map(id, views))
        if key not in known:
            known[key] = targets(views)
        return known[key]

    return call


def inference(net: nn.Module, cfg: Config, device: torch.device) -> Callable[[Any], Any]:
    """The network as a callable without gradient, in the precision of the forward passes."""

    def call(x: Any) -> Any:
        with torch.no_grad(), engine.autocast(cfg.engine.precision, device, cache=False):
            return net(x)

    return call


# ---- compilation and CUDA graphs, before the first batch


def prepare(
    states: list[TrainState],
    targets: teacher.Teacher | teacher.CachedTeacher | None,
    loader: TrainLoader,
) -> list[TrainState]:
    """Compiles and captures what the configuration asks for, on noise; returns the states to train.

    Call it before the data pipeline exists: a capture breaks where one of the pipeline's threads
    waits for the GPU.  Weights, statistics and random streams stay as they were."""
    perf, device = states[0].cfg.perf, loader.device
    graphs = perf.graphs and device.type == "cuda"
    if not (graphs or perf.compile):
        return states
    views = _noise(loader)
    # Recorded embeddings have nothing to compile or capture.
    live = targets if isinstance(targets, teacher.Teacher) else None
    if perf.compile in ("student", "both"):
        for student in states:
            _compile(student, views)
    if perf.compile in ("teacher", "both") and live:
        asked = views[: states[0].method.teacher_views]
        compiled.compile("teacher", live.net, lambda: live.eager(asked), perf.backend)
    if not graphs:
        return states

    states = _with_graphs(states, device)
    replayed = None
    if targets and not live:
        dim = states[0].cfg.student.dim
        replayed = lambda v: Out(torch.ones(len(v), loader.batch, dim, device=device))
    for student in states:
        _capture(student, live or replayed, views, device)
    return states


def rehearse(nets: Nets, ema: models.Net | None, method: Method, views: list[Tensor]) -> None:
    """One step of a copy of the method, which calls teacher and mean student as training will: with
    views of the same shapes, in the same order."""
    with cudagraph.rehearsal(*([ema] if ema else [])), torch.no_grad():
        copy.deepcopy(method).step(nets, views, Progress(0, 0.0))


def _noise(loader: TrainLoader) -> list[Tensor]:
    """Noise in the shapes, dtype and memory format of the loader's views."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.float16 if loader.placement.half else torch.float32
    drawn = (torch.randn(loader.batch, 3, c.size, c.size, generator=g) for c in loader.crops)
    return [
        x.to(device=loader.device, dtype=dtype, memory_format=torch.channels_last) for x in drawn
    ]


def _compile(student: TrainState, views: list[Tensor]) -> None:
    """Compiles the student's backbone in place."""
    device, perf = views[0].device, student.cfg.perf
    step = lambda: compiled.forward_backward(student.net, views)
    with engine.autocast(student.cfg.engine.precision, device):
        compiled.compile(student.name or "student", student.net, step, perf.backend)


def _with_graphs(states: list[TrainState], device: torch.device) -> list[TrainState]:
    """The states, their mean students to become CUDA graphs at the first call."""
    found = []
    for s in states:
        if s.ema and any(isinstance(m, Synced) for m in s.ema.modules()):
            # A collective in each batch norm, and graphs hold none.
            say(
                f"{s.name or 'mean student'}: runs eagerly, not as a CUDA graph: bn.sync exchanges "
                "statistics between the ranks in its forward"
            )
        elif s.ema:
            s = s._replace(ema_forward=_graphed(s, device))
        found.append(s)
    return found


def _graphed(student: TrainState, device: torch.device) -> Forward:
    assert student.ema
    forward = inference(student.ema, student.cfg, device)
    graphed = cudagraph.Graphed("mean student", forward, student.ema.buffers())
    # It returns what its forward returns, or a Later of that.
    return cast(Forward, graphed)


def _capture(
    student: TrainState, targets: Forward | None, views: list[Tensor], device: torch.device
) -> None:
    """Rehearses a step with a network in the student's place, so that the engine sees none of it;
    the graphs of mean student and teacher are captured on the way."""
    # Weights drawn here are thrown away: they must not shift the training's random stream.
    with torch.random.fork_rng(devices=[]):
        net = copy.deepcopy(student.ema) or models.of(student.cfg, train=True)
    net.to(device)
    if student.cfg.engine.stage == 0:
        # As the engine has the network: cuDNN looks for its algorithms in this forward.
        net.to(memory_format=torch.channels_last)
    nets = student.nets(targets)._replace(student=inference(net, student.cfg, device))
    rehearse(nets, student.ema, student.method, views)
