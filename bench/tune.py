"""Times launch configurations of the queue's sweep on the GPU at hand and rewrites this
architecture's rows of kernels/launch.json.

    python bench/tune.py [--minutes 8]     the rows that training uses first; what the time does not
    suffice for stays as it is

A row's candidates are compiled ahead of time, several at once, and those that spill registers or
want more shared memory than there is are refused. The others run the whole op, MoCo's loss and
gradient at K=65536, in a CUDA graph over inputs that overflow the L2 cache; the best three and the
present row run again in turns, and the fastest by the median is written, marked as timed."""

import argparse
import concurrent.futures
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from common import elapsed_ms
from fastdisco.kernels import launch
from fastdisco.kernels import queue as triton_queue
from fastdisco.kernels.triton_sweep import moments_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may have
SMALLEST = 101_376  # of the chips that borrow sm_80's rows: sm_86, sm_89, sm_120
REGISTERS = 65_536  # of a multiprocessor
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
FEW, MANY, KEYS = launch.FEW, 1024, 65536  # rows and queue that are timed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8)
    end = time.monotonic() + 60 * parser.parse_args().minutes - 10
    if not torch.cuda.is_available():
        return "tune: no GPU here; the table is measured on the GPU that it is for"
    capability = torch.cuda.get_device_capability()
    arch = launch.architecture(capability)
    if arch == 80 and capability != (8, 0):
        return f"tune: sm_{capability[0]}{capability[1]} borrows sm_80's rows and has none of its own; tune on an A100, or give launch.py rows for it"
    table, timed = dict(launch.table()), []
    with concurrent.futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        for name in order(arch):
            if time.monotonic() > end:
                print("out of time")
                break
            _, bits, d, few, running = parse(name)
            some = candidates(arch, bits, d, few, table[name])
            fitting = [
                fit
                for fits in pool.map(functools.partial(fits_of, arch, bits, d, running), some)
                for fit in fits
            ]
            best, us = fastest(name, fitting, table[name], end)
            if best:
                table[name] = best._replace(timed=True)
                timed.append(name)
                launch.FILE.write_text(dump(table))
            print(
                f"{name}: {len(some)} candidates, {len(fitting)} fit; {us and round(us, 1)} us by "
                f"{best}",
                flush=True,
            )
    print(
        f"{len(timed)} rows timed and written to {launch.FILE}; now run tests/test_triton.py and "
        "bench/kernels.py"
    )


# ---- what may be launched at all


def parse(name: str) -> tuple[int, int, int, bool, bool]:
    """sm_90 16-bit d128 many fixed -> 90, 16, 128, few False, running False"""
    arch, bits, d, n, kind = re.fullmatch(
        r"sm_(\d+) (\d+)-bit d(\d+) (few|many) (fixed|running)", name
    ).groups()
    return int(arch), int(bits), int(d), n == "few", kind == "running"


def order(arch: int) -> list[str]:
    """This architecture's rows, those that training uses first: bfloat16, d=128."""
    return sorted(
        (n for n in launch.table() if parse(n)[0] == arch),
        key=lambda n: (parse(n)[1], parse(n)[2] != 128, parse(n)[4], parse(n)[3]),
    )


def candidates(
    arch: int, bits: int, d: int, few: bool, present: launch.Launch
) -> list[launch.Launch]:
    """Configurations to compile, the present one first; how many blocks share a multiprocessor
    (ctas) is open where no cap on registers says so."""
    out = [present]
    tma = (True, False) if arch >= 90 and bits == 16 else (False,)
    if bits == 32:  # exact products, without tensor cores: small blocks
        shapes = [
            (rows, keys, warps, 2, None)
            for rows, keys, warps in itertools.product((16, 32), (32, 64), (4, 8))
        ]
    else:
        keys, stages = (32, 64) if d == 256 else (64, 128), (2, 3, 4)
        shapes = [(64, k, w, s, None) for k, w, s in itertools.product(keys, (4, 8), stages)]
        if not few:  # of 4 warps, blocks of 128 spill everywhere
            shapes += [
                (128, k, 8, s, cap) for k, s, cap in itertools.product(keys, stages, (None, 128))
            ]
    for shape, t in itertools.product(shapes, tma):
        rows, k, warps, stages, cap = shape
        how = launch.Launch(
            rows, k, warps, stages, REGISTERS // (32 * warps * cap) if cap else 1, t, cap, False
        )
        if how not in out:
            out.append(how)
    return out


def fits_of(arch: int, bits: int, d: int, running: bool, how: launch.Launch) -> list[launch.Launch]:
    """The configuration with each number of blocks that fits a multiprocessor beside each other;
    nothing where it must not be launched."""
    dtype = torch.float32 if bits == 32 else torch.float16 if running else torch.bfloat16
    # Also with a look for the queue's end, which takes most beside the running maximum.
    for k in (1001, KEYS)[1 - running :]:
        try:
            found = sweep(how, arch, dtype, d, k, running)
        except Exception:  # the compiler gave up on it
            return []
        if [*faults(found, arch, how, k == KEYS)]:
            return []
    if how.registers:
        return [how]
    fit = min(
        REGISTERS // (found["threads"] * found["registers"]),
        SHARED_MEMORY[arch] // max(1, found["shared"]),
        4,
    )
    return [how._replace(ctas=n) for n in range(1, max(1, fit) + 1)]


def compiled(kernel, arch: int, types: dict[str, str], constants: dict, options: dict) -> dict:
    """A kernel for an architecture, without a GPU: its registers, bytes of stack (spills) and
    shared memory, threads and PTX.

    types of the arguments that are none of the constants; pointers are aligned to 16 bytes, as
    torch's are."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]]
            for n, t in types.items()
            if t.startswith("*")
        },
    )
    out = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(out.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name],
            text=True,
            capture_output=True,
            check=True,
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return dict(
        registers=registers,
        stack=stack,
        shared=out.metadata.shared,
        ptx=out.asm["ptx"],
        threads=32 * out.metadata.num_warps,
    )


def sweep(how: launch.Launch, arch: int, dtype: torch.dtype, d: int, k: int, running: bool) -> dict:
    """`compiled` of the sweep under a launch configuration."""
    constants = triton_queue.sweep(how, d, k, running, True)
    options = {n: constants.pop(n) for n in list(constants) if n not in moments_kernel.arg_names}
    rows = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    types = (
        dict(units=rows, queue=rows)
        | dict.fromkeys(("total", "top", "mean"), "*fp32")
        | dict.fromkeys(("n", "rows", "k", "span"), "i32")
    )
    return compiled(
        moments_kernel,
        arch,
        types | dict(c_first="fp32", c_second="fp32"),
        constants,
        options,
    )


def faults(found: dict, arch: int, how: launch.Launch, even: bool):
    """Why a launch configuration must not be shipped."""
    limit = SMALLEST if arch == 80 else SHARED_MEMORY[arch]
    if found["stack"]:
        yield f"{found['stack']} bytes of stack: registers are spilled"
    if found["shared"] > limit:
        yield f"{found['shared']} bytes of shared memory of {limit}"
    if even and how.registers and found["threads"] * found["registers"] * how.ctas > REGISTERS:
        yield f"{found['registers']} registers: {how.ctas} blocks do not fit"


# ---- how fast it is


def fastest(
    name: str, fitting: list[launch.Launch], present: launch.Launch, end: float
) -> tuple[launch.Launch | None, float | None]:
    """The fastest of them and its microseconds; None where the time is up before the present one
    was beaten or confirmed."""
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


def winner(finals: list, prepare, clock, rounds: int = 9):
    """The one with the lowest median over interleaved rounds, and that median."""
    times = {how: [] for how in finals}
    for r in range(rounds):
        for how in finals[::-1] if r % 2 else finals:
            times[how].append(clock(prepare(how)))
    best = min(finals, key=lambda how: statistics.median(times[how]))
    return best, statistics.median(times[best])


def prepared(name: str, how: launch.Launch):
    """Replays of the op under that configuration, and how many calls a replay makes; None where the
    GPU refuses it."""
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
    except Exception as e:  # out of resources, say
        print(f"  {how}: {type(e).__name__}: {e}"[:200])
        return None
    return graph.replay, len(sets)


@functools.lru_cache(maxsize=1)
def inputs(name: str) -> tuple[list, float]:
    """Arguments of queue.moco up to the temperature, several times, and the temperature that takes
    the row `name`."""
    _, bits, d, few, running = parse(name)
    dtype = torch.float32 if bits == 32 else torch.float16 if running else torch.bfloat16
    n, g = FEW if few else MANY, torch.Generator("cuda").manual_seed(0)
    new = lambda *shape: torch.randn(*shape, device="cuda", generator=g)
    count = max(
        2,
        math.ceil(
            2 * torch.cuda.get_device_properties(0).L2_cache_size / (KEYS * d * dtype.itemsize)
        ),
    )
    sets = [
        (new(1, n, d), new(n, d), None, F.normalize(new(KEYS, d), dim=1).to(dtype))
        for _ in range(count)
    ]
    return sets, 0.01 if running and bits == 32 else 0.2


def clocked(run) -> float:
    """Microseconds a call, of some 10 ms of replays."""
    replay, calls = run
    ms = elapsed_ms(replay, 1)
    count = max(1, round(10 / max(ms, 1e-3)))
    return 1e3 * elapsed_ms(replay, count) / (count * calls)


# ---- the table


def dump(table: dict[str, launch.Launch]) -> str:
    """launch.json: a row a line."""
    return (
        "{\n"
        + ",\n".join(
            f" {json.dumps(name)}: {json.dumps(how._asdict())}" for name, how in table.items()
        )
        + "\n}\n"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the compiling processes
    sys.exit(main())
