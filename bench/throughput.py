"""How fast a training goes and what bounds it, beside the official recipe.

    python bench/throughput.py
        synthetic JPEGs and configs/mobv3.yaml: minutes on a GPU, and on a CPU
    python bench/throughput.py --config C --data FOLDER
        your own; overrides follow as block.key=value
    torchrun --nproc_per_node 8 bench/throughput.py
        several ranks; deepspeed starts it, too
    python bench/throughput.py --quick
        tiny networks and images: does it run?

Each part of a step is measured alone, then all together, and the official recipe in the same
process.  A round runs every arm for some steps, in an order drawn anew; figures are medians over
rounds.  Writes throughput-<device>.json and .png into bench/results, or into --out."""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import official
import torch
from harness import finish, parser, row
from harness.results import RESULTS
from harness.tables import show_table
from step.measure import ips, measure, shared
from step.setup import DEFAULT, configuration

from fastdisco import config, engine
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.config import UserError

AIMS = {
    "cpu": dict(step_vs_official=1.5, cached_vs_live_step=1.4),
    "gpu": dict(
        step_vs_official=3,
        step_vs_official_ready=2,
        step_share_of_slowest=0.9,
        teacher_mfu=0.25,
        data_wait=0.02,
        loader_vs_step=1.5,
    ),
}
ROWS = {  # name -> unit, better
    "step_vs_official": ("x of the official recipe's rate, loaders included", "higher"),
    "step_vs_official_ready": ("x of the official recipe's rate, on ready tensors", "higher"),
    "step_share_of_slowest": (
        "of the rate of the slowest of loader, compute and exchange alone",
        "higher",
    ),
    "teacher_mfu": ("of the measured matrix peak", "higher"),
    "teacher_mfu_ceiling": ("of that peak: what its memory traffic allows", "higher"),
    "student_mfu": ("of the measured matrix peak, forward and backward", "higher"),
    "student_mfu_ceiling": ("of that peak: what its memory traffic allows", "higher"),
    "data_wait": ("of the step's time", "lower"),
    "loader_vs_step": ("x of the step's rate", "higher"),
    "step_ips": ("images/s, all ranks, two views each", "higher"),
    "peak_memory_gb": ("GB, a rank", "lower"),
    "cached_vs_live_step": ("x of the live step's rate", "higher"),
    "step_vs_official_bf16": ("x of the official recipe's rate in float32, ours in bf16", "higher"),
}
# Arms in the order of the table, and their names there.
LABELS = {
    "loader": "read, decode, augment",
    "teacher": "teacher",
    "student": "student, both ways",
    "ema": "mean student's (EMA) forward",
    "loss": "loss",
    "exchange": "gradient exchange",
    "optimizer": "optimizer, EMA update",
    "compute": "all compute, ready tensors",
    "ready": "full step, ready tensors",
    "full": "full step",
    "cached": "full step, teacher replayed",
    "bf16": "full step in bf16",
    "official_ready": "official, ready tensors",
    "official": "official recipe",
}


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    dist.defaults()
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
    device = engine.start(config.Engine())
    kind = "gpu" if device.type == "cuda" else "cpu"
    batches = args.batch or ([256, 1024] if kind == "gpu" else [16])
    if args.quick:
        torch.set_num_threads(1)
    elif kind == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // dist.world()))
    summary, samples, details = measured(args, batches, device, kind)
    if dist.rank() == 0:
        out = args.out or RESULTS
        if kind == "cpu" and not list(out.glob("throughput-gpu*.json")):
            none = "no GPU in this machine; python bench/throughput.py on one measures it"
            summary += rows("gpu", "gpu", reason=none)
        name = kind if dist.world() == 1 else f"{kind}-{dist.world()}ranks"
        about = dict(rounds=args.rounds, seconds=args.seconds, batches=batches, details=details)
        about |= dict(official=official.TF32, quick=args.quick)
        finish("throughput", name, summary, samples, out, **about)
    engine.stop()
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add("--config", type=Path, default=DEFAULT)
    add("--data", type=Path, help="as data.train; without it --config's, or synthetic images")
    add(
        "--batch",
        type=int,
        nargs="+",
        help="images per rank and step; on a GPU 256 and 1024, on a CPU 16",
    )
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=1.0, help="of each arm in a round, at least a step")
    add("--minutes", type=float, default=8.0, help="after which no new round starts")
    add("--quick", action="store_true")
    add("--out", type=Path, help="folder of the results")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    add("overrides", nargs="*", metavar="block.key=value")
    args = options.parse_intermixed_args(argv)
    if args.quick:
        args.batch, args.rounds, args.seconds = args.batch or [8], 2, 0.0
        args.out = args.out or Path("out/bench")
    return args


def measured(
    args: argparse.Namespace, batches: list[int], device: torch.device, kind: str
) -> tuple[list[dict], dict, dict]:
    """Rows, the seconds of each arm and round, and what else was found, of each batch."""
    summary, samples, details = [], {}, {}
    with tempfile.TemporaryDirectory(prefix="fastdisco-bench-") as folder:
        folder = Path(shared(folder))
        for batch in batches:
            suffix = kind if batch == batches[0] else f"b{batch}_{kind}"
            until = time.monotonic() + args.minutes * 60 / len(batches)
            cfg = configuration(args, folder, batch, max(batches), kind)
            try:
                found = measure(cfg, batch, folder, device, args.rounds, args.seconds, until)
            except torch.OutOfMemoryError as e:
                # What smaller batches measured is kept.
                if not samples:
                    raise
                reason = f"batch {batch}: out of memory"
                say(f"{reason} ({e})")
                summary += rows(kind, suffix, reason=reason)
                continue
            values = figures(found, batch)
            if dist.rank() == 0:
                show(found, batch, values)
            summary += rows(kind, suffix, values)
            samples[batch] = found.pop("seconds")
            details[batch] = found | dict(verdict=found["verdict"].text)
    return summary, samples, details


def rows(
    kind: str, suffix: str, values: dict[str, float] | None = None, reason: str | None = None
) -> list[dict]:
    """ROWS with their values; or, without values, those of a GPU, with the reason."""
    names = values or [name for name in ROWS if "bf16" not in name]
    return [
        row(
            f"{name}_{suffix}", (values or {}).get(name), unit, AIMS[kind].get(name), better, reason
        )
        for name, (unit, better) in ROWS.items()
        if name in names
    ]


def figures(found: dict, batch: int) -> dict[str, float]:
    """The values of ROWS."""
    took, rate = found["seconds"], found["rates"]
    # Of one arm's rate to another's, within each round.
    ratio = lambda a, b: statistics.median(y / x for x, y in zip(took[a], took[b]))
    out = dict(
        step_vs_official=ratio("full", "official"),
        step_vs_official_ready=ratio("ready", "official_ready"),
        step_share_of_slowest=found["verdict"].share,
        data_wait=statistics.median(found["waits"]),
        loader_vs_step=ratio("loader", "full"),
        step_ips=rate["full"],
        peak_memory_gb=found["memory"],
        cached_vs_live_step=ratio("cached", "full"),
    )
    peak, element_bytes = found["peak_flops"], 4 if found["precision"] == "fp32" else 2
    for net in ("teacher", "student"):
        flops, traffic = found["flops"][net], found["traffic"][net] * element_bytes
        out[f"{net}_mfu"] = flops * rate[net] / dist.world() / peak
        out[f"{net}_mfu_ceiling"] = min(1.0, flops / traffic * found["bandwidth"] / peak)
    if "bf16" in took:
        out["step_vs_official_bf16"] = ratio("bf16", "official")
    return {k: float(f"{v:.4g}") for k, v in out.items()}


def show(found: dict, batch: int, values: dict[str, float]) -> None:
    """Prints the table of the arms, and the verdict."""
    lines = []
    for name, label in LABELS.items():
        if name in found["seconds"]:
            ms = [1e3 * t for t in found["seconds"][name]]
            spread = f"{min(ms):.1f} .. {max(ms):.1f}"
            rate = f"{ips(found['seconds'], name, batch):.1f}"
            lines.append([label, f"{statistics.median(ms):.1f}", spread, rate])
    title = (
        f"{found['teacher']} -> {found['student']}, {found['size']} px, {found['precision']}, "
        f"{dist.world()} x {batch} images"
    )
    show_table(title, ["", "ms a step", "spread", "images/s"], lines)
    mfu = lambda net: (
        f"{values[f'{net}_mfu']:.1%} (its memory traffic allows {values[f'{net}_mfu_ceiling']:.0%})"
    )
    say(
        f"matrix peak {found['peak_flops'] / 1e12:.2f} TFLOP/s, memory "
        f"{found['bandwidth'] / 1e9:.1f} GB/s; of the peak the teacher reaches {mfu('teacher')}, "
        f"the student {mfu('student')}"
    )
    say(found["verdict"].text)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        sys.exit(f"fastdisco: error: {e}")
