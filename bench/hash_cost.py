"""What hashing every draw inside the graph costs, against the same graph fed by DALI's native random operators.

python bench/hash_cost.py FOLDER [--size 224] [--batch 64] [--threads 1] [--rounds 8]; FOLDER holds class folders of images.
Interleaved rounds on the CPU; writes bench/results/hash_cost-cpu.json, one block per size."""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nvidia.dali  # noqa: E402
import torch  # noqa: E402
from nvidia.dali import fn, pipeline_def, types  # noqa: E402

from fastdisco import data  # noqa: E402
from fastdisco.data import graph, loader  # noqa: E402
from fastdisco.views import Crop  # noqa: E402

CPU = torch.device("cpu")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("folder", type=Path)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--images", type=int, default=1024, help="per round and graph")
    a = p.parse_args()
    listing = data.listing(a.folder)
    crops = (Crop(size=a.size),) * 2
    steps = max(1, a.images // a.batch)
    hashed = data.TrainLoader(listing, crops, a.batch, 0, 10**6, 1, a.threads, CPU)
    files = hashed._order(0)
    native = _native(crops, loader._reader(listing, files, files), **loader._pipe(a.batch, a.threads, CPU))
    run = {"hashed": lambda: next(hashed), "native": native.run}
    for f in run.values():
        for _ in range(4):
            f()
    raw = {name: [] for name in run}
    for r in range(a.rounds):
        for name in sorted(run, reverse=r % 2):
            start = time.perf_counter()
            for _ in range(steps):
                run[name]()
            raw[name].append(steps * a.batch / (time.perf_counter() - start))
            print(f"{name} {raw[name][-1]:.0f} images/s", flush=True)
    share = statistics.median(1 - h / n for h, n in zip(raw["hashed"], raw["native"]))
    tag = f"{a.size}px_{a.threads}t"
    summary = [dict(name=f"hash_share_{tag}", value=round(share, 4), unit="share of the loader's time", aim=0.15, better="lower"),
               dict(name=f"loader_{tag}", value=round(statistics.median(raw["hashed"]), 1), unit="images/s of 2 views",
                    aim=2500 if a.size == 32 else None, better="higher")]
    for row in summary:
        print(row)
    out = ROOT / "bench/results/hash_cost-cpu.json"
    out.parent.mkdir(exist_ok=True)
    old = json.loads(out.read_text()) if out.exists() else dict(summary=[], runs={})
    keep = [row for row in old["summary"] if row["name"] not in {s["name"] for s in summary}]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    this = dict(images_per_s=raw, batch=a.batch, data=f"{len(listing.files)} images in {a.folder.name}", commit=commit, device=_cpu(),
                versions=dict(dali=nvidia.dali.__version__, torch=torch.__version__, python=platform.python_version()),
                command="python bench/hash_cost.py " + " ".join([a.folder.name] + sys.argv[2:]))
    out.write_text(json.dumps(dict(summary=keep + summary, runs=old["runs"] | {tag: this}), indent=1) + "\n")


@pipeline_def(enable_conditionals=True)
def _native(crops, reader):
    """The same work on pixels, drawn by fn.random and random_resized_crop."""
    encoded, label = fn.readers.file(**reader)
    image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
    views = []
    for crop in crops:
        low, high = graph.ranges((crop,))
        draw = lambda row, col: fn.random.uniform(range=[float(low[0, row, col]), float(high[0, row, col])])
        x = fn.random_resized_crop(image, size=[crop.size, crop.size], random_area=crop.scale, random_aspect_ratio=crop.ratio)
        if fn.random.coin_flip(probability=crop.jitter_p, dtype=types.BOOL):
            b, c, s, h = draw(graph.LIGHT, 0), draw(graph.LIGHT, 1), draw(graph.COLOUR, 0), draw(graph.COLOUR, 1)
            if fn.random.coin_flip(probability=0.5, dtype=types.BOOL):
                x = fn.hsv(graph._light(x, b, c, "cpu"), saturation=s, hue=h)
            else:
                x = graph._light(fn.hsv(x, saturation=s, hue=h), b, c, "cpu")
        if fn.random.coin_flip(probability=crop.gray_p, dtype=types.BOOL):
            x = graph._gray(x)
        if fn.random.coin_flip(probability=crop.blur_p, dtype=types.BOOL):
            x = fn.gaussian_blur(x, sigma=draw(graph.BLUR, 0))
        views.append(graph._normalise(x, crop.mean, crop.std, fn.random.coin_flip(probability=crop.flip_p)))
    return *views, label


def _cpu() -> str:
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main()
