"""The measurement of one batch: our training, the official recipe, and all arms in rounds."""

import copy
import gc
import os
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import official
import torch
from harness import interleaved

from fastdisco import config, data, models, teacher
from fastdisco.common import dist
from fastdisco.common.console import say
from step import roofline
from step.arms import Arm, arms
from step.ours import Ours
from step.verdict import PARTS, verdict

# Batches of images whose embeddings are recorded and that the official recipe reads.
FEW = 8
# Arms that a loader feeds.
LOADED = ("loader", "full", "cached", "bf16")


def measure(
    cfg: config.Config,
    batch: int,
    folder: Path,
    device: torch.device,
    rounds: int,
    budget: float,
    until: float,
) -> dict:
    """Seconds a step of every arm and round, and what is needed to judge them.

    batch   images of a step on a rank
    budget  seconds of each arm in a round, at least a step
    until   on time.monotonic()'s clock; then no new round starts"""
    before = cleared(device)
    listing = data.listing(cfg.data.train, cfg.data.quarantine)
    rest = np.setdiff1d(np.arange(len(listing.files)), listing.kept[: FEW * cfg.data.batch])
    few = listing._replace(left_out=rest)
    ours = Ours(cfg, listing, config.micro_batch(cfg, dist.world()), device)
    for _ in range(2):
        ready = next(ours.loader)
        ours.step(ready.views)
    memory = (reserved(device) - before) / 1e9
    half = in_bf16(cfg, listing, device)
    recorded, cosine = recorded_teacher(ours, few, device)
    net = published_teacher(cfg, device)
    workers, theirs = cores(device), official_recipe(ours, net, device)
    run = arms(ours, half, recorded, theirs, ready, plain_folder(few, folder), workers)
    idle = 1.5 * ours.loader.placement.prefetch
    steps, took, waits = timed(run, rounds, budget, until, idle)
    rates = {name: ips(took, name, batch) for name in took if name != "matmul"}
    found = dict(
        seconds=took,
        steps=steps,
        waits=waits,
        memory=memory,
        cached_cosine=cosine,
        **roofline.work(ours, net, device, 2 * cfg.bn.groups),
        workers=workers,
        **described(cfg),
    )
    return found | judged(found, rates, batch)


def described(cfg: config.Config) -> dict:
    """What was measured, as tables and pictures name it."""
    return dict(
        student=cfg.student.arch,
        teacher=cfg.teacher.arch,
        size=cfg.view.size,
        precision=cfg.engine.precision,
        threads=cfg.data.threads,
    )


def timed(
    run: dict[str, Arm], rounds: int, budget: float, until: float, idle: float
) -> tuple[dict[str, int], dict[str, list[float]], list[float]]:
    """Steps of each arm in a round, seconds of a step in each round, and the shares of the full
    step that waited for data.

    idle  batches' worth of time after a loaded arm, in which its loader fills up beside nobody"""
    steps = {}
    for name in sorted(run):
        run[name](1)  # warm-up: first shapes, graphs, workers
        steps[name] = shared(max(1, min(100, round(budget / max(run[name](1)[0], 1e-6)))))
    pause = idle * run["loader"](2)[0]

    def turn(name: str) -> tuple[float, float]:
        found = run[name](steps[name])
        if name in LOADED:
            time.sleep(pause)
        return found

    def stop(r: int) -> bool:
        late = shared(r >= 3 and time.monotonic() > until)
        if late:
            say(f"stopped after {r} of {rounds} rounds, as --minutes says")
        return late

    turns = {name: (lambda name=name: turn(name)) for name in run}
    found = interleaved(turns, rounds, stop=stop)
    took = {name: [seconds for seconds, _ in values] for name, values in found.items()}
    return steps, took, [waited / seconds for seconds, waited in found["full"]]


def judged(found: dict, rates: dict[str, float], batch: int) -> dict:
    """The verdict, and the rates under the names that metrics.jsonl has."""
    took, full, wait = found["seconds"], rates["full"], statistics.median(found["waits"])
    alone = {k: rates[k] for k in ("loader", "compute", "exchange") if k in rates}
    parts = {k: statistics.median(took[k]) for k in PARTS if k in took and k != "exchange"}
    return dict(
        verdict=verdict(alone, parts, full),
        total_ips=full,
        data_time=wait * batch * dist.world() / full,
        compute_ips=full / max(1 - wait, 1e-9),
        peak_flops=found["matmul_flops"] / min(took["matmul"]),
        rates=rates,
    )


def ips(took: dict[str, list[float]], name: str, batch: int) -> float:
    """Images a second over all ranks, the median of the rounds."""
    return batch * dist.world() / statistics.median(took[name])


def cleared(device: torch.device) -> int:
    """Frees what measured another batch; bytes of the GPU that stay reserved."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


def reserved(device: torch.device) -> int:
    """Bytes at the peak: of the GPU's allocator, or of the process without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_bf16(cfg: config.Config, listing: data.Listing, device: torch.device) -> Ours | None:
    """The same training in bf16, beside one in float32 on a CPU."""
    if device.type != "cpu" or cfg.engine.precision != "fp32":
        return None
    half = cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"precision": "bf16"})})
    return Ours(half, listing, config.micro_batch(cfg, dist.world()), device)


def recorded_teacher(
    ours: Ours, few: data.Listing, device: torch.device
) -> tuple[teacher.CachedTeacher, float]:
    """The teacher's recorded embeddings of a few images, and the lowest cosine of one batch's to
    what the teacher gives itself."""
    cfg = ours.cfg
    loader = data.TrainLoader(
        few,
        config.crops(cfg),
        config.micro_batch(cfg, dist.world()),
        cfg.run.seed,
        cfg.run.epochs,
        1,
        cfg.data.threads,
        device,
        placement=ours.loader.placement,
        rounds=1,
    )
    record = cfg.teacher.model_copy(update={"cache": "record"})
    recorded = teacher.create(record, cfg.student.dim, cfg.engine.precision, loader)
    recorded.complete()
    seen = next(loader)
    recorded.at(seen.index, seen.epoch)
    replayed, live = recorded(seen.views).z, ours.nets.teacher(seen.views).z.float()
    cosine = torch.nn.functional.cosine_similarity(replayed, live, dim=-1)
    return recorded, cosine.min().item()


def published_teacher(cfg: config.Config, device: torch.device) -> models.Net:
    """The teacher's network as published: its batch norms are not folded away."""
    t, options = cfg.teacher, teacher.Options(device)
    return teacher.load(t.file, t.arch, t.kwargs, cfg.student.dim, options).net


def official_recipe(ours: Ours, net: models.Net, device: torch.device) -> official.Official:
    """The official recipe with our student and this teacher, which stay ours."""
    cfg = ours.cfg
    queue = cfg.method.queue // cfg.data.batch * cfg.data.batch
    nets = copy.deepcopy(ours.twin), copy.deepcopy(net)
    temp, momentum = cfg.method.temp, cfg.method.momentum
    return official.Official(*nets, queue, cfg.student.dim, device, temp, momentum)


def cores(device: torch.device) -> int:
    """CPU cores of a rank."""
    ranks = dist.world() if device.type == "cpu" else max(1, torch.cuda.device_count())
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def plain_folder(few: data.Listing, folder: Path) -> str:
    """Class folders of these images, as the official recipe reads them."""
    if few.source == folder / "images":
        return str(few.source)
    if dist.rank() == 0:
        for i in few.kept.tolist():
            path = folder / "few" / f"{few.labels[i]:06}" / f"{i}{Path(few.files[i]).suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(few.read(i))
    dist.barrier()
    return str(folder / "few")


def shared(value):
    """Rank 0's value, on every rank."""
    if dist.world() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=dist.device())
    return box[0]
