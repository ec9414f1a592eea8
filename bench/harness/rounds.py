"""Interleaved rounds and clocks.

A round runs every arm once, so whatever else slows the machine meets all arms alike, and ratios
are taken within a round."""

import random
import time
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")


def interleaved(
    arms: dict[Name, Callable[[], Value]],
    rounds: int,
    warm_up: int = 0,
    stop: Callable[[int], bool] | None = None,
) -> dict[Name, list[Value]]:
    """What each arm returned in each round.

    warm_up  rounds that run first and do not count
    stop     asked before each round, with its number; true ends the measurement there"""
    found: dict[Name, list[Value]] = {name: [] for name in arms}
    for r in range(warm_up + rounds):
        if stop and stop(r):
            break
        for name in order(arms, r):
            value = arms[name]()
            if r >= warm_up:
                found[name].append(value)
    return found


def order(names: Iterable[Name], r: int) -> list[Name]:
    """The arms in the order of round r: two take turns at being first, more are drawn anew.

    It is the same in every process, so that ranks run the same arm at the same time."""
    names = sorted(names)
    if len(names) == 2:
        return names[::-1] if r % 2 else names
    return random.Random(r).sample(names, len(names))


def seconds(
    run: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one call, the mean over `repeats` calls, on the given clock."""
    begin = clock()
    for _ in range(repeats):
        run()
    return (clock() - begin) / repeats


def now(device) -> float:
    """Seconds on the host's clock, read when all ranks and the device have finished their work."""
    import torch

    from fastdisco.common import dist

    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def elapsed_ms(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds of `repeats` calls together, on the GPU's clock."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
