"""Times launch configurations of the queue's sweep on the GPU at hand and rewrites this
architecture's rows of kernels/launch.json.

    python bench/tune.py [--minutes 8]
        the rows that training uses first; a row that the time does not suffice for stays as it is

A row's candidates are compiled ahead of time, several at once.  Those that spill registers or want
more shared memory than there is are refused.  The others run the whole op, MoCo's loss and gradient
at K=65536, in a CUDA graph over inputs that overflow the L2 cache.  The best three and the present
row run again in interleaved rounds, and the fastest by the median is written, marked as timed."""

import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from fastdisco.kernels import launch
from fastdisco.kernels import queue as triton_queue
from fastdisco.kernels.triton_sweep import moments_kernel
from harness import parser
from losses.launches import KEYS, fastest, parse
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that a block may have.
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
# The same on the chips that borrow sm_80's rows: sm_86, sm_89, sm_120.
SMALLEST = 101_376
# Registers of a multiprocessor.
REGISTERS = 65_536
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def main() -> str | None:
    """What sys.exit takes: None, or why nothing could be timed."""
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=8)
    end = time.monotonic() + 60 * options.parse_args().minutes - 10
    if not torch.cuda.is_available():
        return "tune: no GPU here; the table is measured on the GPU that it is for"
    capability = torch.cuda.get_device_capability()
    arch = launch.architecture(capability)
    if arch == 80 and capability != (8, 0):
        return (
            f"tune: sm_{capability[0]}{capability[1]} borrows sm_80's rows and has none of its own; "
            "tune on an A100, or give launch.py rows for it"
        )
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=spawn) as pool:
        timed = tuned(arch, pool, end)
    print(
        f"{timed} rows timed and written to {launch.FILE}; now run tests/test_triton.py and "
        "bench/kernels.py"
    )
    return None


def tuned(arch: int, pool: concurrent.futures.Executor, end: float) -> int:
    """Times the architecture's rows until `end` on time.monotonic()'s clock, writes the table after
    each, and returns how many were timed."""
    table, timed = dict(launch.table()), 0
    for name in order(arch):
        if time.monotonic() > end:
            print("out of time")
            break
        _, bits, d, few, running = parse(name)
        some = candidates(arch, bits, d, few, table[name])
        fits = pool.map(functools.partial(fits_of, arch, bits, d, running), some)
        fitting = list(itertools.chain.from_iterable(fits))
        best, us = fastest(name, fitting, table[name], end)
        if best:
            table[name] = best._replace(timed=True)
            timed += 1
            launch.FILE.write_text(dump(table))
        print(
            f"{name}: {len(some)} candidates, {len(fitting)} fit; {us and round(us, 1)} us by "
            f"{best}",
            flush=True,
        )
    return timed


# ---- what may be launched at all


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
    if bits == 32:
        # Exact products, without tensor cores: small blocks.
        shapes = [
            (rows, keys, warps, 2, None)
            for rows, keys, warps in itertools.product((16, 32), (32, 64), (4, 8))
        ]
    else:
        keys, stages = (32, 64) if d == 256 else (64, 128), (2, 3, 4)
        shapes = [(64, k, w, s, None) for k, w, s in itertools.product(keys, (4, 8), stages)]
        if not few:
            # With 4 warps blocks of 128 rows spill everywhere.
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
    """The configuration with each number of blocks that fit a multiprocessor side by side; nothing
    where it must not be launched."""
    dtype = torch.float32 if bits == 32 else torch.float16 if running else torch.bfloat16
    # Also with a look for the queue's end, which takes most beside the running maximum.
    for k in (1001, KEYS)[1 - running :]:
        try:
            found = sweep(how, arch, dtype, d, k, running)
        except Exception:
            # The compiler gave up on it.
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
    """A kernel compiled for an architecture, without a GPU: its registers, bytes of stack (spills)
    and of shared memory, threads and PTX.

    types  of the arguments that are no constants; pointers are aligned to 16 bytes, as torch's
           are"""
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
