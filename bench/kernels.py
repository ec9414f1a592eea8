"""The queue losses against whatever else computes them, forward and backward: time, memory, error,
and the distance to the hardware's floors.

    python bench/kernels.py [--minutes 8] [--only gpu|cpu]
        writes bench/results/kernels-<device>.json, also when the time did not suffice for all

On a GPU it measures every B and K of SHAPES, those with aims first.  A contender runs under
CUDA-graph replay and eagerly, in interleaved rounds whose order is drawn anew, over as many sets of
inputs as overflow the L2 cache twice.  Then, and alone where there is no GPU, it measures the CPU
forms at B=256, K=65536.

  eager fp32, bf16       the paper's formula with all logits; TF32 off, or queue and logits in
                         bfloat16
  compile fp32, bf16     torch.compile of the same, at the shapes with aims
  sdpa, sdpa split       PyTorch's flash attention with keys = values = queue: its output and
                         log-sum-exp give loss and gradient; as it is, and with the queue dealt to a
                         batch that fills the chip
  ours                   fastdisco.kernels, the queue in bfloat16

Errors are against chunked float64 on the float32 queue, so rounding the queue counts.  Memory is
what a call allocates beyond its inputs: on a GPU the allocator's peak, on the CPU the growth of a
fresh process's peak resident set."""

import argparse
import json
import os
import signal
import sys
import time

import torch
from harness import finish, parser
from harness.results import earlier
from losses.on_cpu import on_cpu, resident_growth
from losses.on_gpu import on_gpu
from losses.rows import LATE, summary

# What the CPU forms take, in seconds.
CPU_PART = 45


def main() -> str | int | None:
    """What sys.exit takes: None, or why one of our losses was not measured."""
    options = parser(__doc__)
    options.add_argument(
        "--minutes", type=float, default=8, help="then what was found is written (%(default)s)"
    )
    options.add_argument("--only", choices=("gpu", "cpu"), help="one part; both without it")
    # Loss, contender, B, K, d: the fresh process of `on_cpu.memory`.
    options.add_argument("--memory", nargs=5, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.memory:
        loss, name, *shape = args.memory
        print(json.dumps(resident_growth(loss, name, *map(int, shape))))
        return None
    # The result needs it: were it missing only at the end, all would have been measured for nothing.
    import fastdisco.run.environment  # noqa: F401

    # What was found until then is written below.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.monotonic() + 60 * args.minutes
    device = "gpu" if torch.cuda.is_available() else "cpu"
    if args.only == "gpu" and device == "cpu":
        options.error("--only gpu: there is no GPU here; leave it out, or take --only cpu")
    # The result of the CPU alone is that of a machine without a GPU.
    device = "cpu" if args.only == "cpu" else device
    found = dict(shapes=[], cpu={}, ceilings=None, only=args.only)
    if args.only == "gpu":
        found["cpu"] = earlier("kernels", device).get("cpu", {})
    try:
        if device == "gpu":
            on_gpu(found, end - (0 if args.only else CPU_PART))
        if args.only != "gpu":
            on_cpu(found["cpu"], end)
    finally:
        rows = summary(found, device == "gpu")
        finish("kernels", device, rows, found, load_before=os.getloadavg()[0])
    return failures(found)


def failures(found: dict) -> str | None:
    """A line for each shape at which our own loss failed; running out of time is no failure."""
    ours = {
        f"{one['loss']} {one['shape']}": one.get("failed")
        or one["contenders"].get("ours", {}).get("failed", LATE)
        for one in found["shapes"]
    }
    return "\n".join(f"{where}: {why}" for where, why in ours.items() if why != LATE) or None


if __name__ == "__main__":
    sys.exit(main())
