"""What hashing every draw inside the graph costs, against the same graph fed by DALI's native random operators; on the CPU.

    python bench/hash_cost.py [--threads 1] [--rounds 8]     the demo's photographs at 224 px and its patches at 32 px

Interleaved rounds; writes bench/results/hash_cost-cpu.json."""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import row, write

import torch
from nvidia.dali import fn, pipeline_def, types

from fastdisco import data
from fastdisco.data import demo, graph, loader
from fastdisco.views import Crop

CPU = torch.device("cpu")
BATCH = 64


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    summary, samples = [], {}
    with tempfile.TemporaryDirectory() as folder:
        demo.write(Path(folder, "patches"), train=100, val=1)
        for size, root, images in ((224, photographs(Path(folder, "photographs")), 768), (32, Path(folder, "patches/train"), 2048)):
            samples[size] = measure(data.listing(root), size, images, args.threads, args.rounds)
            share = statistics.median(1 - h / n for h, n in zip(samples[size]["hashed"], samples[size]["native"]))
            summary += [row(f"hash_share_{size}px", round(share, 4), "share of the loader's time", 0.15, "lower"),
                        row(f"loader_{size}px", round(statistics.median(samples[size]["hashed"]), 1), "images/s, 2 views each", None, "higher")]
    print(write("hash_cost", "cpu", summary, samples, threads=args.threads, batch=BATCH))
    for r in summary:
        print(r["name"], r["value"], r["unit"])


def photographs(root: Path) -> Path:
    """Four JPEGs of 500 px on the long side from each of the demo's photographs, as class folders."""
    for name, file in demo.PHOTOS.items():
        (root / name).mkdir(parents=True)
        image = demo.photo(demo._find(file))
        for i in range(4):
            image.resize((image.width * 500 // demo.LONG, image.height * 500 // demo.LONG)).save(root / name / f"{i}.jpg", quality=90)
    return root


def measure(listing: data.Listing, size: int, images: int, threads: int, rounds: int) -> dict[str, list[float]]:
    """images/s of each round; a round reads `images` with one graph, then the other: far more than what each prefetches while the other runs."""
    crops = (Crop(size=size),) * 2
    hashed = data.TrainLoader(listing, crops, BATCH, 0, 10**6, 1, threads, CPU)
    files = hashed._order(0)
    native = _native(crops, loader._reader(listing, files, files, BATCH, ""), **loader._pipe(BATCH, threads, CPU))
    run = {"hashed": lambda: next(hashed), "native": native.run}
    for f in run.values():
        for _ in range(4):
            f()
    raw = {name: [] for name in run}
    for r in range(rounds):
        for name in sorted(run, reverse=r % 2 == 1):
            begin = time.perf_counter()
            for _ in range(images // BATCH):
                run[name]()
            raw[name].append(images // BATCH * BATCH / (time.perf_counter() - begin))
    return raw


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


if __name__ == "__main__":
    sys.exit(main())
