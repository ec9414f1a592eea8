"""What hashing every draw costs, against the same graph fed by DALI's native random operators; on
the CPU.

    python bench/hash_cost.py [--threads 1] [--rounds 8]     the demo's photographs at 224 px and
    its patches at 32 px

Interleaved rounds; writes bench/results/hash_cost-cpu.json."""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import row, write
from nvidia.dali import fn, pipeline_def, types

from fastdisco import data
from fastdisco.config import Crop
from fastdisco.data import demo, draws, graph, pipelines

CPU = torch.device("cpu")
BATCH = 64


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    summary, samples = [], {}
    with tempfile.TemporaryDirectory() as folder:
        demo.write(Path(folder, "patches"), train=100, val=1)
        for size, root, images in (
            (224, photographs(Path(folder, "photographs")), 768),
            (32, Path(folder, "patches/train"), 2048),
        ):
            samples[size] = measure(data.listing(root), size, images, args.threads, args.rounds)
            share = statistics.median(
                1 - h / n for h, n in zip(samples[size]["hashed"], samples[size]["native"])
            )
            summary += [
                row(
                    f"hash_share_{size}px",
                    round(share, 4),
                    "share of the loader's time",
                    0.15,
                    "lower",
                ),
                row(
                    f"loader_{size}px",
                    round(statistics.median(samples[size]["hashed"]), 1),
                    "images/s, 2 views each",
                    None,
                    "higher",
                ),
            ]
    print(write("hash_cost", "cpu", summary, samples, threads=args.threads, batch=BATCH))
    for r in summary:
        print(r["name"], r["value"], r["unit"])


def photographs(root: Path) -> Path:
    """Four JPEGs of 500 px on the long side from each of the demo's photographs, as class
    folders."""
    for name, file in demo.PHOTOS.items():
        (root / name).mkdir(parents=True)
        image = demo.photo(demo.find(file))
        for i in range(4):
            image.resize((image.width * 500 // demo.LONG, image.height * 500 // demo.LONG)).save(
                root / name / f"{i}.jpg", quality=90
            )
    return root


def measure(
    listing: data.Listing, size: int, images: int, threads: int, rounds: int
) -> dict[str, list[float]]:
    """images/s of each round; a round reads `images` with one graph, then the other: far more than
    what each prefetches while the other runs."""
    crops = (Crop(size=size),) * 2
    hashed = data.TrainLoader(listing, crops, BATCH, 0, 10**6, 1, threads, CPU)
    files = hashed._order(0)
    native = _native(
        crops,
        pipelines.reader(listing, files, ""),
        hashed.placement,
        **pipelines.settings(BATCH, threads, CPU, hashed.placement),
    )
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
def _native(crops, reader, placement):
    """The same work on pixels, drawn by fn.random and random_resized_crop."""
    encoded = fn.readers.file(**reader)[0]
    image = fn.decoders.image(
        encoded, device="cpu", output_type=types.RGB, adjust_orientation=False
    )
    views = []
    for crop in crops:
        low, high = draws.ranges((crop,))
        draw = lambda row, col: fn.random.uniform(
            range=[float(low[0, row, col]), float(high[0, row, col])]
        )
        coin = lambda p: fn.random.coin_flip(probability=p, dtype=types.BOOL)
        d = dict(
            brightness=draw(draws.LIGHT, 0),
            contrast=draw(draws.LIGHT, 1),
            saturation=draw(draws.COLOUR, 0),
            hue=draw(draws.COLOUR, 1),
            light_first=coin(0.5),
            jitter=coin(crop.jitter_p),
            gray=coin(crop.gray_p),
            blur=coin(crop.blur_p),
            flip=fn.random.coin_flip(probability=crop.flip_p),
        )
        taps = types.Constant(draws.gaussian(np.float32([crop.blur_sigma[1]]), crop))
        d |= dict(across=taps, down=fn.reshape(taps, shape=[-1, 1]))
        x = fn.random_resized_crop(
            image,
            size=[crop.size, crop.size],
            random_area=crop.scale,
            random_aspect_ratio=crop.ratio,
        )
        views.append(graph._augment(x, crop, d, placement))
    return tuple(views)


if __name__ == "__main__":
    sys.exit(main())
