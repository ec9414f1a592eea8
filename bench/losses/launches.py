"""Launch configurations of the queue's sweep under the clock, for bench/tune.py."""

import functools
import math
import re
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fastdisco.kernels import launch
from fastdisco.kernels import queue as triton_queue
from harness import elapsed_ms, interleaved

# Rows, where there are many, and queue that are timed.
MANY, KEYS = 1024, 65536


def parse(name: str) -> tuple[int, int, int, bool, bool]:
    """sm_90 16-bit d128 many fixed -> 90, 16, 128, few False, running False"""
    arch, bits, d, n, kind = re.fullmatch(
        r"sm_(\d+) (\d+)-bit d(\d+) (few|many) (fixed|running)", name
    ).groups()
    return int(arch), int(bits), int(d), n == "few", kind == "running"


def fastest(
    name: str, fitting: list[launch.Launch], present: launch.Launch, end: float
) -> tuple[launch.Launch | None, float | None]:
    """The fastest of the configurations that fit, and its microseconds; None where the time is up
    before the present one was beaten or confirmed."""
    first = {}
    for how in fitting:
        if time.monotonic() > end:
            return None, None
        if (run := prepared(name, how)) is not None:
            first[how] = clocked(run)
    if not first:
        return None, None
    finals = sorted(first, key=first.get)[:3]
    finals += [present] if present in first and present not in finals else []
    return winner(finals, functools.cache(lambda how: prepared(name, how)), clocked)


def winner(
    finals: list, prepare: Callable, clock: Callable, rounds: int = 9
) -> tuple[launch.Launch, float]:
    """The one with the lowest median over interleaved rounds, and that median."""
    arms = {i: (lambda how=how: clock(prepare(how))) for i, how in enumerate(finals)}
    medians = {i: statistics.median(times) for i, times in interleaved(arms, rounds).items()}
    best = min(medians, key=medians.get)
    return finals[best], medians[best]


def prepared(name: str, how: launch.Launch) -> tuple[Callable, int] | None:
    """(what replays the op under that configuration, calls in a replay); None where the GPU refuses
    it."""
    sets, temp = inputs(name)
    launch.table()[name] = how
    try:
        for x in sets:
            triton_queue.moco(*x, temp, True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for x in sets:
                triton_queue.moco(*x, temp, True)
    except Exception as e:
        # Out of resources, for instance.
        print(f"  {how}: {type(e).__name__}: {e}"[:200])
        return None
    return graph.replay, len(sets)


@functools.lru_cache(maxsize=1)
def inputs(name: str) -> tuple[list, float]:
    """Sets of arguments of queue.moco up to the temperature, as many as overflow the L2 cache twice,
    and the temperature for which the launch table's row `name` is taken."""
    _, bits, d, few, running = parse(name)
    dtype = torch.float32 if bits == 32 else torch.float16 if running else torch.bfloat16
    n, g = launch.FEW if few else MANY, torch.Generator("cuda").manual_seed(0)
    new = lambda *shape: torch.randn(*shape, device="cuda", generator=g)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, math.ceil(2 * cache / (KEYS * d * dtype.itemsize)))
    sets = [
        (new(1, n, d), new(n, d), None, F.normalize(new(KEYS, d), dim=1).to(dtype))
        for _ in range(count)
    ]
    return sets, 0.01 if running and bits == 32 else 0.2


def clocked(run: tuple[Callable, int]) -> float:
    """Microseconds a call, over some 10 ms of replays."""
    replay, calls = run
    ms = elapsed_ms(replay, 1)
    count = max(1, round(10 / max(ms, 1e-3)))
    return 1e3 * elapsed_ms(replay, count) / (count * calls)
