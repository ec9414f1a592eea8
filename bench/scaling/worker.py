"""A CPU rank of bench/scale.py, until it is killed."""

import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from step.arms import parts
from step.ours import Ours

from fastdisco import config, data, engine
from fastdisco.common import dist
from fastdisco.engine.deepspeed_engine import import_deepspeed

# Done once by the server that ranks are forked from.
import_deepspeed()


def serve(
    pipe: Connection, rank: int, world: int, port: int, file: Path, overrides: list[str]
) -> None:
    """Answers (arm, steps) with the seconds of each step.

    An arm is `full`, a training step with its batch; the name of one of its parts; or a number of
    bytes that all ranks sum.
    overrides  of the configuration file; its data.batch is a rank's"""
    where = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_PORT=port)
    os.environ.update({k: str(v) for k, v in where.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    device = engine.start(config.Engine())
    cfg = config.load(file, overrides)
    batch = cfg.data.batch
    cfg = config.load(file, [*overrides, f"data.batch={batch * world}"])
    ours = Ours(cfg, data.listing(cfg.data.train), batch, device)
    views = next(ours.loader).views
    ours.step(views)
    runs: dict[str, Callable[[], object]] = parts(ours, views) if world == 1 else {}
    runs["full"] = lambda: ours.step(next(ours.loader).views)
    pipe.send(None)
    while True:
        arm, steps = pipe.recv()
        if isinstance(arm, int):
            sent = torch.zeros(arm // 4)
            run = lambda sent=sent: dist.all_sum(sent)
        else:
            run = runs[arm]
        if arm == "full":
            # Batches that were made while other arms ran do not count.
            for _ in range(ours.loader.placement.prefetch):
                next(ours.loader)
        dist.barrier()
        pipe.send([timed(run) for _ in range(steps)])


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
