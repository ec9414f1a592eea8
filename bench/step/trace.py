"""Ten steps of bench/throughput.py's training under torch's profiler.

    python bench/step/trace.py FOLDER [--quick]

Writes FOLDER/trace.json.gz, which chrome://tracing and ui.perfetto.dev show, and
FOLDER/found.json: the seconds of a step, the share of the time in which the GPU computes, and the
operators that take longest."""

import gzip
import json
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

# Run as a file, this finds the benches' modules; imported, they are found already.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import throughput
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastdisco import config, data, engine
from fastdisco.common import dist
from step.ours import Ours
from step.setup import configuration

STEPS, LONGEST = 10, 25


def main(folder: Path, quick: bool) -> None:
    dist.defaults()
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
    device = engine.start(config.Engine())
    on_gpu = device.type == "cuda"
    args = throughput.arguments(["--quick"] if quick else [])
    batch = 8 if quick else 256 if on_gpu else 16
    with tempfile.TemporaryDirectory(prefix="fastdisco-trace-") as temporary:
        made = Path(temporary)
        cfg = configuration(args, made, batch, batch, "gpu" if on_gpu else "cpu")
        listing = data.listing(cfg.data.train, cfg.data.quarantine)
        ours = Ours(cfg, listing, config.micro_batch(cfg, dist.world()), device)
        folder.mkdir(parents=True, exist_ok=True)
        found = traced(ours, folder / "trace.json.gz")
    (folder / "found.json").write_text(json.dumps(found, indent=1) + "\n")
    engine.stop()


def traced(ours: Ours, file: Path) -> dict:
    """Profiles STEPS steps with their loader, and writes the trace."""
    steps(ours, 5)
    activities = [ProfilerActivity.CPU]
    if ours.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        begin = time.perf_counter()
        steps(ours, STEPS)
        took = time.perf_counter() - begin
    plain = file.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(file, "wb") as packed:
        shutil.copyfileobj(source, packed)
    plain.unlink()
    events = profiler.key_averages()
    # Operators on the CPU carry the time of their kernels as well, which would count twice.
    kernels = [x for x in events if x.device_type != DeviceType.CPU and not x.is_user_annotation]
    on_gpu = sum(x.self_device_time_total for x in kernels) / 1e6
    spent = lambda x: x.self_device_time_total if kernels else x.self_cpu_time_total
    longest = sorted(kernels or events, key=spent, reverse=True)[:LONGEST]
    return dict(
        seconds_a_step=took / STEPS,
        gpu_busy=on_gpu / took,
        longest=[[x.key[:80], x.count, round(spent(x) / 1e3, 3)] for x in longest],
        longest_are="kernel (on a CPU operator), calls, ms of its own",
    )


def steps(ours: Ours, count: int) -> None:
    for _ in range(count):
        ours.step(next(ours.loader).views)
    if ours.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--quick" in sys.argv[2:])
