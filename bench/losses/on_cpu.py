"""The CPU part of bench/kernels.py: the plain form and ours, in float32."""

import gc
import json
import subprocess
import sys
import time
from functools import partial

import torch
from harness import ROOT, interleaved, seconds

from losses.contenders import OURS, PLAIN, graded
from losses.exact import errors, exact, inputs

FORMS = dict(plain=PLAIN, ours=OURS)
# B, K, d.
SHAPE = (256, 65536, 128)


def on_cpu(found: dict, end: float, shape: tuple[int, int, int] = SHAPE, rounds: int = 15) -> None:
    """Fills found[loss]: of both forms the times in interleaved rounds, the errors and the peak
    memory.  After three rounds none starts within 10 s of `end` on time.monotonic()'s clock."""
    late = lambda r: r > 2 and time.monotonic() > end - 10
    for loss in OURS:
        data = inputs(loss, *shape, "cpu")
        want = exact(loss, *data)
        runs = {name: partial(graded(form[loss]), *data) for name, form in FORMS.items()}
        one = {name: errors(run(), want) for name, run in runs.items()}
        times = interleaved(
            {n: partial(seconds, run, 1) for n, run in runs.items()}, rounds, 0, late
        )
        for name in runs:
            one[name] |= {"times_s": times[name], "memory_bytes": memory(loss, name, shape)}
        found[loss] = one | {
            "shape": list(shape),
            "threads": torch.get_num_threads(),
            "memory": "growth of a fresh process's peak resident set",
        }


def memory(loss: str, name: str, shape: tuple[int, int, int]) -> int:
    """`resident_growth` in a fresh process."""
    bench = ROOT / "bench/kernels.py"
    alone = [sys.executable, str(bench), "--memory", loss, name, *map(str, shape)]
    return json.loads(subprocess.run(alone, text=True, capture_output=True, check=True).stdout)


def resident_growth(loss: str, name: str, b: int, k: int, d: int) -> int:
    """Bytes by which this process's peak resident set grows in one call; a small call first loads
    the libraries."""
    run = graded(FORMS[name][loss])
    run(*inputs(loss, 64, 64, d, "cpu"))
    data = inputs(loss, b, k, d, "cpu")
    run(*[x[:64].clone() for x in data])
    gc.collect()
    with open("/proc/self/clear_refs", "w") as f:
        # The peak is now what is resident.
        f.write("5")
    before = status("VmHWM")
    run(*data)
    return status("VmHWM") - before


def status(name: str) -> int:
    """A line of this process's status, in bytes."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))
