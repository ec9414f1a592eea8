"""The arms of bench/loader.py, each a process of its own: one that reads must not own the threads
or the memory of another."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import torch
from harness import interleaved

from fastdisco import data
from fastdisco.data.placement import Placement
from loading.theirs import CROP

# All on the CPU, in float32; two batches are made ahead.
CPU = Placement("cpu", "cpu", "cpu", False, 0.0, 2)


def rounds_of(
    arms: dict[str, tuple], rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """images/s, and memory in GB, of each arm in each round.

    arms     name -> the arguments of `serve` after the pipe
    seconds  of an arm in a round; a first round is warm-up"""
    with started(arms) as pipes:
        ask = {name: partial(asked, pipe, seconds) for name, pipe in pipes.items()}
        found = interleaved(ask, rounds, warm_up=1)
    ips = {name: [rate for rate, _ in values] for name, values in found.items()}
    return ips, {name: [memory for _, memory in values] for name, values in found.items()}


@contextlib.contextmanager
def started(arms: dict[str, tuple]) -> Iterator[dict]:
    """The pipe to the process of each arm, once it has made its first batches."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        for name, arm in arms.items():
            pipes[name], there = spawn.Pipe()
            processes.append(spawn.Process(target=serve, args=(there, *arm)))
            processes[-1].start()
            there.close()
            pipes[name].recv()
        yield pipes
    finally:
        for p in processes:
            p.kill()
            p.join()


def asked(pipe, seconds: float) -> tuple[float, float]:
    pipe.send(seconds)
    return pipe.recv()


def serve(pipe, make, root: Path, batch: int, threads: int, how) -> None:
    """The process of an arm, until it is killed: answers a number of seconds with images/s and
    memory in GB.

    make  `ours` or `torchvision`; how: the last argument of that"""
    torch.set_num_threads(1)
    gpu = isinstance(how, Placement) and how.out == "gpu"
    if gpu:
        torch.zeros(1, device="cuda")
        free = torch.cuda.mem_get_info()[0]
    batches, ready = make(root, batch, threads, how)
    for _ in range(ready + 1):
        next(batches)
    pipe.send(None)
    while seconds := pipe.recv():
        # Batches that were made while other arms ran do not count.
        for _ in range(ready):
            next(batches)
        wait(gpu)
        begin, n = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            for _ in range(max(1, 64 // batch)):
                next(batches)
                n += batch
        wait(gpu)
        rate = n / (time.perf_counter() - begin)
        pipe.send((rate, (free - torch.cuda.mem_get_info()[0]) / 1e9 if gpu else resident()))


def ours(root: Path, batch: int, threads: int, way: Placement) -> tuple[Iterator, int]:
    """The training's loader, and how many batches it has ready at most."""
    device = torch.device("cuda" if way.out == "gpu" else "cpu")
    listing, crops = data.listing(root), (CROP, CROP)
    batch = min(batch, len(listing.files))
    loader = data.TrainLoader(listing, crops, batch, 0, 10**6, 1, threads, device, placement=way)
    return loader, way.prefetch


def busy_cores(root: Path, batch: int, threads: int, way: Placement, seconds: float) -> float:
    """Cores that a process keeps busy whose GPU always has some 50 ms of work ahead, as in a
    training: what waits for the device by spinning shows, and what sleeps does not."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_cores, (root, batch, threads, way, seconds))


def _cores(root: Path, batch: int, threads: int, way: Placement, seconds: float) -> float:
    torch.set_num_threads(1)
    batches, ready = ours(root, batch, threads, way)
    work, done = (_work if way.out == "gpu" else lambda: None), []
    for step in count():
        if step == ready + 2:
            wall, cpu = time.perf_counter(), time.process_time()
        elif step > ready + 2 and time.perf_counter() - wall > seconds:
            return (time.process_time() - cpu) / (time.perf_counter() - wall)
        # The views are dropped while the work that was launched before is still queued.
        done.append(work())
        next(batches)
        if step > 1 and done[step - 2]:
            done[step - 2].synchronize()


def _work() -> torch.cuda.Event:
    """Queues some 25 ms of matrix products; waiting for the event does not spin."""
    x = torch.ones(8192, 8192, device="cuda", dtype=torch.float16)
    for _ in range(16):
        x = x @ x * 1e-4
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event


def wait(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()


def resident() -> float:
    """GB of this process and its children; pages that they share are divided among them."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    lines = [x for p in pids for x in Path(f"/proc/{p}/smaps_rollup").read_text().splitlines()]
    return sum(int(x.split()[1]) for x in lines if x.startswith("Pss:")) * 1024 / 1e9
