"""What the engine costs over plain DistributedDataParallel at each ZeRO stage: the same step of a
MobileNetV3-Large on ready tensors. stage0_at_end is stage 0 without engine.overlap, as DeepSpeed
does it.

    python bench/engine.py      on the CPU 2 ranks with 16 images of 64 px, in 2 views; on GPUs a
    rank each, with 32 of 224 px

A round runs every arm for some steps, in an order drawn anew.  Writes
bench/results/engine-<device>.json."""

import argparse
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from common import now, row, row_of_rounds, write

from fastdisco import config, engine, kernels, models
from fastdisco.common import dist
from fastdisco.engine import optim
from fastdisco.models import heads

ARMS = {
    "ddp": {},
    "stage0": {"stage": 0},
    "stage0_at_end": {"stage": 0, "overlap": False},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3},
}  # what they set in the engine's block
AIM = {f"stage{config.Engine().stage}": 1.05}


def main():
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=224 if gpus else 64, help="pixels")
    parser.add_argument("--images", type=int, default=32 if gpus else 16, help="a rank")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--bucket-mb", type=float, default=config.Engine().bucket_mb, help="engine.bucket_mb"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--steps", type=int, default=20 if gpus else 2, help="of each arm in a round"
    )
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks, load = gpus or 2, os.getloadavg()[0]
    os.environ["WORLD_SIZE"] = str(ranks)  # what the result says
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (ranks, port, args, Path(folder, "times")), ranks)
        times = json.loads(Path(folder, "times").read_text())
    summary = [
        row(
            "engine_ddp_step",
            round(statistics.median(times["ddp"]) * 1e3, 1),
            "ms, plain DDP",
            None,
            "lower",
        ),
        row(
            "engine_load_before",
            round(load, 1),
            "processes that wanted a core in the minute before",
            None,
            "lower",
        ),
    ]
    for name in list(ARMS)[1:]:
        ratios = [t / d for t, d in zip(times[name], times["ddp"])]
        summary.append(
            row_of_rounds(
                f"engine_vs_ddp_{name}", ratios, 3, "x of DDP's step time", AIM.get(name), "lower"
            )
        )
    device = "gpu" if gpus else "cpu"
    print(
        write(
            "engine",
            device,
            summary,
            times,
            **{
                k: getattr(args, k)
                for k in ("size", "images", "precision", "bucket_mb", "rounds", "steps")
            },
        )
    )
    for r in summary:
        print(
            r["name"],
            r["value"],
            r["unit"],
            "quartiles {} {}".format(*r["quartiles"]) if "quartiles" in r else "",
        )


def measure(rank: int, ranks: int, port: int, args, out: Path):
    """Seconds per step of each arm in each round, written by rank 0."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    device = engine.start(config.Engine(precision=args.precision))
    g = torch.Generator().manual_seed(rank)
    views = [
        torch.randn(args.images, 3, args.size, args.size, generator=g).to(
            device, memory_format=torch.channels_last
        )
        for _ in range(2)
    ]
    target = torch.randn(2, args.images, 128, generator=g).to(device)
    step = {name: arm(name, views, target, args, device) for name in ARMS}
    first = {name: [f().item() for _ in range(3)][0] for name, f in step.items()}  # and warm-up
    assert max(first.values()) - min(first.values()) < 1e-3, f"the arms differ: {first}"
    times = {name: [] for name in step}
    for r in range(args.rounds):
        for name in random.Random(r).sample(sorted(step), len(step)):  # the same on every rank
            begin = now(device)
            for _ in range(args.steps):
                step[name]()
            times[name].append((now(device) - begin) / args.steps)
    if rank == 0:
        out.write_text(json.dumps(times))
    engine.stop()


def arm(name: str, views, target, args, device: torch.device):
    """One training step, as a function; distillation towards fixed targets, SGD with momentum."""
    torch.manual_seed(0)
    net = models.create("mobilenetv3_large_100", lambda dim: heads.mlp(dim, 2048, 128)).to(device)
    opt = optim.create(net, config.Optim(), 1e-3)
    if name == "ddp":
        net.to(memory_format=torch.channels_last)
        ddp = (
            torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
            if dist.world() > 1
            else net
        )

        def step():
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

        def step():
            loss = kernels.distill(student(views).z, target)
            student.backward(loss)
            student.step()
            return loss

    return step


if __name__ == "__main__":
    sys.exit(main())
