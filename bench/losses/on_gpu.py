"""The GPU part of bench/kernels.py: every contender at every shape, eagerly and under CUDA-graph
replay, and what the GPU itself can do."""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from harness import elapsed_ms, interleaved
from torch import Tensor

from losses.contenders import OURS, contenders
from losses.exact import errors, exact, floors, inputs
from losses.rows import LATE

# B, K, d; those with aims come first.
AIMED = [(1024, 65536, 128), (256, 65536, 128)]
GRID = itertools.product((64, 256, 1024, 4096), (4096, 65536, 1 << 20), (128,))
SHAPES = [*AIMED, (1024, 65536, 256), *(shape for shape in GRID if shape not in AIMED)]
# Where there are aims, and elsewhere.
ROUNDS = {True: 15, False: 5}
# Milliseconds of a contender in a round.
ROUND_MS = 15


def on_gpu(found: dict, end: float) -> None:
    """Fills found["ceilings"] and found["shapes"] until `end` on time.monotonic()'s clock."""
    torch.set_float32_matmul_precision("highest")
    found["ceilings"] = measure_ceilings()
    print("ceilings:", {k: f"{v:.3g}" for k, v in found["ceilings"].items()}, flush=True)
    for shape, loss in itertools.product(SHAPES, OURS):
        if time.monotonic() > end:
            found["out_of_time"] = True
            print("out of time")
            return
        least = floors(loss, *shape, found["ceilings"])
        one = dict(loss=loss, shape=list(shape), floors_us=least, contenders={})
        found["shapes"].append(one)
        # Whatever happens at one shape, the others are measured.
        attempt(one, partial(measure, one, loss, shape, end))
        torch._dynamo.reset()
        fresh()
        times = {n: c.get("graph_us") or c for n, c in one["contenders"].items()}
        print(loss, *shape, times, flush=True)


def measure(one: dict, loss: str, shape: tuple[int, int, int], end: float) -> None:
    """Fills one["contenders"]: {name: graph_us, eager_us (medians), *_rounds_us, memory_bytes,
    loss_error, grad_error, or oom, or failed}."""
    properties = torch.cuda.get_device_properties(0)
    b, k, d = shape
    # As many sets of inputs as overflow the L2 cache twice.
    sets = max(2, min(64, math.ceil(2 * properties.L2_cache_size / (2 * k * d + 8 * b * d))))
    data = {torch.float32: [inputs(loss, *shape, "cuda", seed) for seed in range(sets)]}
    data[torch.bfloat16] = [(z, o, q.bfloat16()) for z, o, q in data[torch.float32]]
    want = exact(loss, *data[torch.float32][0])
    aimed, results = shape in AIMED, one["contenders"]
    runs = {}
    for name, (dtype, call) in contenders(
        loss, shape, aimed, properties.multi_processor_count
    ).items():
        results[name] = {}
        if time.monotonic() > end:
            results[name]["failed"] = LATE
        elif checked(results[name], call, data[dtype], want):
            runs[name] = partial(sweep, call, data[dtype])
    interleave(results, "eager", runs, sets, ROUNDS[aimed])
    fresh()
    # One pool: never do two graphs run at a time, and no result outlives its replay.
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: captured(results[name], run, pool) for name, run in runs.items()}
    replays = {name: graph.replay for name, graph in graphs.items() if graph}
    interleave(results, "graph", replays, sets, ROUNDS[aimed])


def sweep(call: Callable, sets: list[tuple[Tensor, ...]]) -> None:
    """The contender on every set of inputs."""
    for x in sets:
        call(*x)


def checked(
    result: dict, call: Callable, sets: list[tuple[Tensor, ...]], want: tuple[Tensor, Tensor]
) -> bool:
    """Whether the contender runs; adds its errors and the memory that a call allocates."""
    # Compiles, where there is something to compile.
    if not attempt(result, partial(sweep, call, sets)):
        return False
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = errors(call(*sets[0]), want)
    result |= found | {"memory_bytes": torch.cuda.max_memory_allocated() - before}
    return True


def captured(result: dict, run: Callable[[], object], pool):
    """The run as a CUDA graph; None where it cannot be captured, and result says why."""
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        # A stream of our own: torch does not leave its capture stream where a capture fails.
        with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.graph(graph, pool=pool):
            run()

    return graph if attempt(result, capture) else None


def attempt(result: dict, work: Callable[[], object]) -> bool:
    """Whether it ran; if not, result says why."""
    try:
        work()
        torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        result["oom"] = True
    except Exception as e:
        # A contender that this GPU or version refuses is a finding, not the bench's end.
        result["failed"] = f"{type(e).__name__}: {e}"[:300]
    fresh()
    return False


def fresh() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def interleave(
    results: dict, what: str, runs: dict[str, Callable[[], object]], sets: int, rounds: int
) -> None:
    """Adds <what>_us, the median time of a call in microseconds, and the rounds' times.

    sets  how many calls a run makes"""
    clocks = {}
    for name, run in runs.items():
        if attempt(results[name], run):
            repeats = max(1, round(ROUND_MS / max(elapsed_ms(run, 1), 1e-3)))
            clocks[name] = partial(call_us, run, repeats, sets)
    for name, times in interleaved(clocks, rounds).items():
        results[name] |= {
            f"{what}_us": statistics.median(times),
            f"{what}_rounds_us": [round(x, 3) for x in times],
        }


def call_us(run: Callable[[], object], repeats: int, sets: int) -> float:
    return 1e3 * elapsed_ms(run, repeats) / (repeats * sets)


def measure_ceilings() -> dict[str, float]:
    """What this GPU does in a second, now: bytes read plus written by a copy of 1 GiB, bfloat16
    operations of a square product, exponentials in float32."""
    x = torch.randn(1 << 28, device="cuda")
    y, n = torch.empty_like(x), 8192
    a, b = torch.randn(2, n, n, device="cuda", dtype=torch.bfloat16)
    c = torch.empty_like(a)
    exps, programs, block, loops = exponentials(), 132 * 64, 1024, 2048
    work = dict(
        bytes_per_s=(lambda: y.copy_(x), 2 * 4 * x.numel()),
        flop_per_s=(lambda: torch.mm(a, b, out=c), 2 * n**3),
        exp_per_s=(
            lambda: exps[programs,](x, LOOPS=loops, BLOCK=block, num_warps=4),
            programs * block * loops,
        ),
    )
    out = {}
    for name, (run, amount) in work.items():
        for _ in range(3):
            run()
        ms = statistics.median(elapsed_ms(run, 3) / 3 for _ in range(10))
        out[name] = amount / (1e-3 * ms)
    return out


def exponentials():
    """A Triton kernel that computes exponentials and does nothing else."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, LOOPS: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + at)
        for _ in range(LOOPS):
            v = tl.exp2(v - 1.0)
        tl.store(x + at, v)

    return kernel
