"""What the engine costs over plain DistributedDataParallel at each ZeRO stage: the same step of a
MobileNetV3-Large on ready tensors.

    python bench/engine.py
        on the CPU 2 ranks with 16 images of 64 px, in 2 views; on GPUs a rank each, with 32 of
        224 px

stage0_at_end is stage 0 without engine.overlap, as DeepSpeed does it.  A round runs every arm for
some steps, in an order drawn anew.  Writes bench/results/engine-<device>.json."""

import argparse
import functools
import json
import os
import socket
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from harness import finish, interleaved, now, parser, row, row_of_rounds, seconds

from fastdisco import config, engine, kernels, models
from fastdisco.common import dist
from fastdisco.engine import optim
from fastdisco.models import heads

# What the arms set in the engine's block.
ARMS = {
    "ddp": {},
    "stage0": {"stage": 0},
    "stage0_at_end": {"stage": 0, "overlap": False},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3},
}
AIM = {f"stage{config.Engine().stage}": 1.05}


def main() -> None:
    gpus = torch.cuda.device_count()
    args = arguments(gpus)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks, load = gpus or 2, os.getloadavg()[0]
    # The result says how many ranks measured.
    os.environ["WORLD_SIZE"] = str(ranks)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "times")
        torch.multiprocessing.spawn(measure, (ranks, port, args, file), ranks)
        times = json.loads(file.read_text())
    finish("engine", "gpu" if gpus else "cpu", summary(times, load), times, **vars(args))


def arguments(gpus: int) -> argparse.Namespace:
    options = parser(__doc__)
    add, default = options.add_argument, config.Engine().bucket_mb
    add("--size", type=int, default=224 if gpus else 64, help="pixels")
    add("--images", type=int, default=32 if gpus else 16, help="a rank")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--bucket-mb", type=float, default=default, help="engine.bucket_mb")
    add("--rounds", type=int, default=30)
    add("--steps", type=int, default=20 if gpus else 2, help="of each arm in a round")
    return options.parse_args()


def summary(times: dict[str, list[float]], load: float) -> list[dict]:
    """The rows: seconds of plain DDP, and each stage's ratio to it within each round."""
    step = round(statistics.median(times["ddp"]) * 1e3, 1)
    waiting = "processes that wanted a core in the minute before"
    rows = [
        row("engine_ddp_step", step, "ms, plain DDP", None, "lower"),
        row("engine_load_before", round(load, 1), waiting, None, "lower"),
    ]
    for name in list(ARMS)[1:]:
        ratios = [t / d for t, d in zip(times[name], times["ddp"])]
        unit, aim = "x of DDP's step time", AIM.get(name)
        rows.append(row_of_rounds(f"engine_vs_ddp_{name}", ratios, 3, unit, aim, "lower"))
    return rows


def measure(rank: int, ranks: int, port: int, args: argparse.Namespace, out: Path) -> None:
    """A rank: seconds per step of each arm in each round, which rank 0 writes."""
    here = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_PORT=port)
    os.environ.update({k: str(v) for k, v in here.items()}, MASTER_ADDR="127.0.0.1")
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    device = engine.start(config.Engine(precision=args.precision))
    g = torch.Generator().manual_seed(rank)
    shape = args.images, 3, args.size, args.size
    views = [
        torch.randn(shape, generator=g).to(device, memory_format=torch.channels_last)
        for _ in range(2)
    ]
    target = torch.randn(2, args.images, 128, generator=g).to(device)
    steps = {name: arm(name, views, target, args, device) for name in ARMS}
    first = {name: warm(step) for name, step in steps.items()}
    assert max(first.values()) - min(first.values()) < 1e-3, f"the arms differ: {first}"
    clock = functools.partial(now, device)
    timed = {n: functools.partial(seconds, step, args.steps, clock) for n, step in steps.items()}
    times = interleaved(timed, args.rounds)
    if rank == 0:
        out.write_text(json.dumps(times))
    engine.stop()


def warm(step: Callable[[], torch.Tensor]) -> float:
    """The loss of the first of three steps."""
    first, *_ = [step().item() for _ in range(3)]
    return first


def arm(
    name: str,
    views: list[torch.Tensor],
    target: torch.Tensor,
    args: argparse.Namespace,
    device: torch.device,
) -> Callable[[], torch.Tensor]:
    """One training step, as a function that returns its loss: distillation towards fixed targets,
    SGD with momentum."""
    torch.manual_seed(0)
    net = models.create("mobilenetv3_large_100", lambda dim: heads.mlp(dim, 2048, 128)).to(device)
    opt = optim.create(net, config.Optim(), 1e-3)
    if name == "ddp":
        net.to(memory_format=torch.channels_last)
        ddp = net
        if dist.world() > 1:
            ddp = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)

        def step() -> torch.Tensor:
            with engine.autocast(args.precision, device):
                z = ddp(views).z
            loss = kernels.distill(z, target)
            opt.zero_grad()
            loss.backward()
            opt.step()
            return loss
    else:
        cfg = config.Engine(precision=args.precision, bucket_mb=args.bucket_mb, **ARMS[name])
        student = engine.create(net, opt, cfg, len(views[0]), 1, 0.0)

        def step() -> torch.Tensor:
            loss = kernels.distill(student(views).z, target)
            student.backward(loss)
            student.step()
            return loss

    return step


if __name__ == "__main__":
    sys.exit(main())
