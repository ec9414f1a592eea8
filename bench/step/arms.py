"""The arms of bench/throughput.py: each part of a step alone, the whole step, and the official
recipe."""

import time
from collections.abc import Callable

import official
import torch
from harness import now, seconds
from torch import Tensor

from fastdisco import data, models, teacher
from fastdisco.common import dist
from fastdisco.methods import Nets
from fastdisco.models import Out
from step import roofline
from step.ours import Ours

# Number of steps -> (seconds of a step, and of them those that waited for data).
Arm = Callable[[int], tuple[float, float]]


def arms(
    ours: Ours,
    half: Ours | None,
    recorded: teacher.CachedTeacher,
    theirs: official.Official,
    ready: data.Batch,
    folder: str,
    workers: int,
) -> dict[str, Arm]:
    """All arms by name.

    half      the training in bf16, where it is measured beside float32
    recorded  replays the teacher's embeddings of the images that its own loader reads
    ready     a batch on the device, for the arms that do not load
    folder    class folders that the official recipe reads with so many workers"""
    flat = as_published(ready.views)
    prefetch = ours.loader.placement.prefetch

    def replay(batch: data.Batch) -> None:
        recorded.at(batch.index, batch.epoch)
        ours.step(batch.views, recorded)

    def published() -> None:
        with official.defaults():
            theirs(*flat)

    device, size = ours.device, ours.cfg.view.size
    found = {name: repeat(run, device) for name, run in parts(ours, ready.views).items()} | {
        "ready": repeat(lambda: ours.step(ready.views), device),
        "loader": loaded(lambda batch: None, ours.loader, prefetch, device),
        "full": loaded(lambda batch: ours.step(batch.views), ours.loader, prefetch, device),
        "cached": loaded(replay, recorded.loader, prefetch, device),
        "matmul": repeat(roofline.matmul(device), device),
        "official": recipe(theirs, folder, size, len(flat[0]), workers, device),
        "official_ready": repeat(published, device),
    }
    if half:
        found["bf16"] = loaded(lambda batch: half.step(batch.views), half.loader, prefetch, device)
    return found


def as_published(views: list[Tensor]) -> list[Tensor]:
    """The views as the official code has them: float32 and NCHW.  On a GPU, ours may come in half
    precision."""
    return [v.float().contiguous() for v in views]


def parts(ours: Ours, views: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Each part of a step alone, on ready views, and all compute together."""
    with torch.no_grad():
        done = Out(*(x if x is None else x.detach() for x in ours.plain(views)))
        targets = Out(ours.nets.teacher(views).z)
    # The loss alone: networks that hand out embeddings made before.
    leaf = Out(*(x if x is None else x.clone().requires_grad_() for x in done))
    stub = Nets(*(lambda v, out=out: first(out, len(v)) for out in (leaf, done, targets)))

    def train_student() -> None:
        out = [x for x in ours.plain(views) if x is not None]
        torch.autograd.backward(out, [torch.ones_like(x) for x in out])
        # The gradients stay: the update, timed alone, needs some.
        ours.twin_optimizer.zero_grad(set_to_none=False)

    def loss() -> None:
        ours.loss(stub, views).backward()
        ours.method.after_step()

    def update() -> None:
        ours.twin_optimizer.step()
        models.ema_update(ours.ema, ours.twin, 0.999)

    found = {
        "teacher": lambda: ours.nets.teacher(views).z,
        "student": train_student,
        "ema": lambda: ours.nets.ema(views[-1:]).z,
        "loss": loss,
        "optimizer": update,
        "compute": lambda: ours.compute(views),
    }
    if dist.world() > 1:
        size = sum(p.numel() for p in ours.twin.parameters())
        gradients = torch.zeros(size, device=ours.device)
        found["exchange"] = lambda: dist.all_sum(gradients)
    return found


def first(out: Out, views: int) -> Out:
    """The embeddings of the first views."""
    return Out(*(x if x is None else x[:views] for x in out))


def repeat(run: Callable[[], object], device: torch.device) -> Arm:
    """An arm that loads nothing."""
    return lambda n: (seconds(run, n, lambda: now(device)), 0.0)


def loaded(step: Callable, source, prefetch: int, device: torch.device) -> Arm:
    """An arm whose steps take a batch of the source each."""

    def run(n: int) -> tuple[float, float]:
        # Batches that were made while other arms ran do not count.
        for _ in range(prefetch if n > 1 else 0):
            step(next(source))
        begin, waited = now(device), 0.0
        for _ in range(n):
            ask = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - ask
            step(batch)
        return (now(device) - begin) / n, waited / n

    return run


def recipe(
    theirs: official.Official,
    folder: str,
    size: int,
    batch: int,
    workers: int,
    device: torch.device,
) -> Arm:
    """The official recipe with its own loader."""
    epochs = {}  # steps -> a loader whose epoch is twice as long

    def run(n: int) -> tuple[float, float]:
        # In whole rounds of the workers, who end their batches together.
        steps = n if n == 1 and device.type == "cpu" else workers * -(-n // workers)
        if steps not in epochs:
            epochs.clear()
            epochs[steps] = official.loader(folder, size, batch, workers, 2 * steps)
        for i, (views, _) in enumerate(epochs[steps]):
            if i == steps:  # by now the loader runs at its pace
                begin = now(device)
            with official.defaults():
                theirs(*(x.to(device, non_blocking=True) for x in views))
        return (now(device) - begin) / steps, 0.0

    return run
