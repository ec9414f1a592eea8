"""Images/s of the training's loader: two 224 px views with MoCo-v2's augmentation, fp32 and
normalised, from JPEGs as found on the web.

    python bench/loader.py [--data FOLDER|TAR] [--rounds N] [--batch N] [--cache]

Without a GPU: our loader against torchvision in a DataLoader, from a folder and from tars, with 1
to 4 threads, and the cost of each stage.  With a GPU: where to decode and augment, the decoding
engine's share, threads and prefetch, with images/s and memory of each.  Writes
bench/results/loader-<device>.json.

With --cache: tars of a bucket on loopback that are in the cache already, against the same tars in a
folder.  Writes bench/results/loader_cache-<device>.json.

Every arm is a process of its own.  In a round each in turn, in an order drawn anew, reads a number
of batches after those that it has ready."""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from harness import finish, parser, row, row_of_rounds
from harness.results import RESULTS
from loading.arms import CPU, busy_cores, ours, rounds_of
from loading.bucket import bucket
from loading.images import photographs
from loading.stages import profile
from loading.theirs import torchvision

from fastdisco import data
from fastdisco.data import pack
from fastdisco.data.placement import Placement

CORES = len(os.sched_getaffinity(0))
COPIED = "x of the speed of views handed over by DLPack"
CACHED = "s3_cached_vs_local", "x of the images/s from tars in a folder", 0.95
# What a machine without a GPU leaves open: unit, and what is better.
GPU_ROWS = {
    "loader_ips_gpu": ("images/s, 2 views each", "higher"),
    "loader_gpu_vs_cpu": ("x of all on the CPU, all cores", "higher"),
    "loader_hw_share": ("best share of the decoding engine", "higher"),
    "loader_copied_vs_dlpack": (COPIED, "higher"),
    "loader_copied_cores": ("cores busy while the GPU works, data.copy_views", "lower"),
    "loader_dlpack_cores": ("cores busy while the GPU works, by DLPack", "lower"),
    "loader_vram_gb": ("GB", "lower"),
}


def main() -> None:
    gpu = torch.cuda.is_available()
    args = arguments(gpu)
    with tempfile.TemporaryDirectory() as folder:
        root, what = photographs(Path(folder, "train"), args.data)
        tars = Path(folder, "tars")
        pack.pack(root, tars, shard_mb=16)
        measure = on_cache if args.cache else on_gpu if gpu else on_cpu
        summary, samples = measure(args, root, tars)
    about = vars(args) | dict(data=what)
    name = "loader_cache" if args.cache else "loader"
    finish(name, "gpu" if gpu else "cpu", summary, samples, **about)


def arguments(gpu: bool) -> argparse.Namespace:
    options = parser(__doc__)
    add = options.add_argument
    what = "class folders, or a tar of images; default: 240 synthetic photographs"
    add("--data", type=Path, help=what)
    add("--threads", type=int, default=min(CORES, 16 if gpu else 2))
    add("--batch", type=int, default=128 if gpu else 32)
    add("--rounds", type=int, default=7)
    add("--seconds", type=float, default=2.0, help="of an arm in a round")
    add("--cache", action="store_true", help="of object storage, against a folder")
    return options.parse_args()


def on_cache(args: argparse.Namespace, root: Path, tars: Path) -> tuple[list[dict], dict]:
    """Tars of object storage from the second epoch on, against tars in a folder."""
    with tempfile.TemporaryDirectory() as folder, bucket(Path(folder)) as url:
        pack.pack(root, url / "set", shard_mb=16)
        listing = data.listing(url / "set")
        # The first epoch's work.
        listing.remote.hold(listing.places.tars).release()
        arms = {
            "cached": (ours, url / "set", args.batch, args.threads, CPU),
            "local": (ours, tars, args.batch, args.threads, CPU),
        }
        ips, _ = rounds_of(arms, args.rounds, args.seconds)
    rows = [
        ratio(CACHED[0], ips["cached"], ips["local"], *CACHED[1:]),
        rate("loader_ips_s3_cached", ips["cached"]),
    ]
    return rows, dict(ips=ips)


def on_cpu(args: argparse.Namespace, root: Path, tars: Path) -> tuple[list[dict], dict]:
    """Ours and torchvision's two; then what each stage of ours costs."""
    t = args.threads
    others = {f"{n} threads": (ours, root, args.batch, n, CPU) for n in range(1, 5) if n != t}
    arms = {
        "folder": (ours, root, args.batch, t, CPU),
        "tars": (ours, tars, args.batch, t, CPU),
        "torchvision_pil": (torchvision, root, args.batch, t, "pil"),
        "torchvision_v2": (torchvision, root, args.batch, t, "v2"),
        **others,
    }
    ips, memory = rounds_of(arms, args.rounds, args.seconds)
    stages = profile(root, args.batch, args.rounds)
    summary = [
        *cpu_rows(ips, t),
        gigabytes("loader_memory_gb", memory["folder"], "GB of the process, torch included"),
        gigabytes(
            "loader_torchvision_memory_gb",
            memory["torchvision_pil"],
            "GB of the process and its workers",
        ),
    ]
    for stage, ms in stages.items():
        name, unit = f"loader_cost_{stage}_ms", "ms of a core an image, both views"
        summary.append(row(name, round(statistics.median(ms), 3), unit, None, "lower"))
    if not (RESULTS / "loader_cache-cpu.json").exists():
        name, unit, aim = CACHED
        summary.append(row(name, None, unit, aim, "higher", "bench/loader.py --cache measures it"))
    for name, (unit, better) in GPU_ROWS.items():
        summary.append(row(name, None, unit, None, better, "no NVIDIA GPU here"))
    return summary, dict(ips=ips, memory_gb=memory, cost_ms=stages)


def cpu_rows(ips: dict[str, list[float]], threads: int) -> list[dict]:
    """The rows of speed."""
    folder, pil, v2 = ips["folder"], ips["torchvision_pil"], ips["torchvision_v2"]
    best = [max(p, v) for p, v in zip(pil, v2)]
    against = lambda what: f"loader_vs_torchvision_{what}cpu"
    by_threads = [
        rate(f"loader_ips_cpu_{n}_threads", folder if n == threads else ips[f"{n} threads"])
        for n in range(1, 5)
    ]
    return [
        ratio(against(""), folder, best, "x of the faster of torchvision's two", 2.0),
        ratio(against("pil_"), folder, pil, "x, transforms on PIL images, blur by PIL"),
        ratio(against("v2_"), folder, v2, "x, transforms v2 on tensors"),
        rate("loader_ips_cpu", folder),
        *by_threads,
        ratio("loader_tar_vs_folder", ips["tars"], folder, "x of the folder's images/s"),
    ]


def on_gpu(args: argparse.Namespace, root: Path, tars: Path) -> tuple[list[dict], dict]:
    """One setting after another, each kept at its best; then the ways against each other."""
    table: list[dict] = []

    def best_of(candidates: list[tuple[Placement, int]]) -> tuple[Placement, int]:
        """Measures each (way, threads) and returns the fastest."""
        table.extend(alone(args, root, way, n) for way, n in candidates)
        measured = zip(table[-len(candidates) :], candidates)
        return max(measured, key=lambda x: x[0]["ips"])[1]

    base, threads = Placement("gpu", "gpu", "gpu", True, 0.65, 2), args.threads
    shares = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
    base, threads = best_of([(base._replace(hw_load=share), threads) for share in shares])
    counts = [n for n in sorted({1, 2, 4, 8, 16, args.threads}) if n <= CORES]
    base, threads = best_of([(base, n) for n in counts])
    base, threads = best_of([(base._replace(prefetch=p), threads) for p in (1, 2, 3, 4)])
    # Of this way alone: where several arms live, each sees the memory of all.
    vram = max(table[-4:], key=lambda x: x["ips"])["vram_gb"]
    arms = {
        "gpu": (ours, root, args.batch, threads, base),
        "gpu fp32": (ours, root, args.batch, threads, base._replace(half=False)),
        "cpu decode": (ours, root, args.batch, CORES, base._replace(decode="cpu")),
        "cpu": (ours, root, args.batch, CORES, base._replace(decode="cpu", augment="cpu")),
        "copied": (ours, root, args.batch, threads, base._replace(copy=True)),
        "tars": (ours, tars, args.batch, threads, base),
    }
    ips, _ = rounds_of(arms, args.rounds, args.seconds)
    cores = {
        name: busy_cores(root, args.batch, threads, base._replace(copy=name == "copied"), 5.0)
        for name in ("dlpack", "copied")
    }
    rows = gpu_rows(ips, base, threads, vram)
    for name, value in cores.items():
        unit, better = GPU_ROWS[f"loader_{name}_cores"]
        rows.append(row(f"loader_{name}_cores", round(value, 2), unit, None, better))
    return rows, dict(sweep=table, ips=ips, cores=cores)


def alone(args: argparse.Namespace, root: Path, way: Placement, threads: int) -> dict:
    """Speed and memory of one way by itself."""
    arm = ours, root, args.batch, threads, way
    ips, memory = rounds_of({"": arm}, 2, args.seconds / 2)
    speed, vram = round(statistics.median(ips[""]), 1), round(memory[""][-1], 2)
    found = dict(way._asdict(), threads=threads, ips=speed, vram_gb=vram)
    print(found, flush=True)
    return found


def gpu_rows(ips: dict[str, list[float]], best: Placement, threads: int, vram: float) -> list[dict]:
    gpu, folder = ips["gpu"], "x of the folder's images/s"
    return [
        rate("loader_ips_gpu", gpu),
        rate("loader_ips_gpu_fp32", ips["gpu fp32"]),
        rate("loader_ips_gpu_cpu_decode", ips["cpu decode"]),
        rate("loader_ips_gpu_all_cpu", ips["cpu"]),
        ratio("loader_gpu_vs_cpu", gpu, ips["cpu"], "x of all on the CPU, all cores"),
        ratio("loader_copied_vs_dlpack", ips["copied"], gpu, COPIED),
        ratio("loader_gpu_tar_vs_folder", ips["tars"], gpu, folder),
        row("loader_hw_share", best.hw_load, "best share of the decoding engine", None, "higher"),
        row("loader_gpu_threads", threads, "best threads", None, "lower"),
        row("loader_gpu_prefetch", best.prefetch, "best prefetch", None, "lower"),
        row("loader_vram_gb", vram, "GB, without the CUDA context", None, "lower"),
    ]


def ratio(name: str, a: list[float], b: list[float], unit: str, aim: float | None = None) -> dict:
    """The row of a's speed over b's within each round."""
    return row_of_rounds(name, [x / y for x, y in zip(a, b)], 3, unit, aim, "higher")


def rate(name: str, ips: list[float]) -> dict:
    return row_of_rounds(name, ips, 1, "images/s, 2 views each", None, "higher")


def gigabytes(name: str, values: list[float], unit: str) -> dict:
    return row(name, round(max(values), 2), unit, None, "lower")


if __name__ == "__main__":
    sys.exit(main())
