"""What hashing every draw costs on the CPU, against the same graph fed by DALI's native random
operators.

    python bench/hash_cost.py [--threads 1] [--rounds 8]

Reads the demo's photographs at 224 px and its patches at 32 px, in interleaved rounds.  Writes
bench/results/hash_cost-cpu.json."""

import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import finish, interleaved, parser, row, seconds
from nvidia.dali import fn, pipeline_def, types

from fastdisco import data
from fastdisco.config import Crop
from fastdisco.data import demo, draws, graph, pipelines

CPU = torch.device("cpu")
BATCH = 64


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=8)
    args = options.parse_args()
    summary, samples = [], {}
    with tempfile.TemporaryDirectory() as folder:
        demo.write(Path(folder, "patches"), train=100, val=1)
        photos, patches = photographs(Path(folder, "photographs")), Path(folder, "patches/train")
        for size, root, images in ((224, photos, 768), (32, patches, 2048)):
            ips = measure(data.listing(root), size, images, args.threads, args.rounds)
            summary += rows(size, ips["hashed"], ips["native"])
            samples[size] = ips
    finish("hash_cost", "cpu", summary, samples, threads=args.threads, batch=BATCH)


def rows(size: int, hashed: list[float], native: list[float]) -> list[dict]:
    """The rows of a size, from images/s in each round."""
    share = statistics.median(1 - h / n for h, n in zip(hashed, native))
    rate, unit = statistics.median(hashed), "images/s, 2 views each"
    name, of = f"hash_share_{size}px", "share of the loader's time"
    return [
        row(name, round(share, 4), of, 0.15, "lower"),
        row(f"loader_{size}px", round(rate, 1), unit, None, "higher"),
    ]


def photographs(root: Path) -> Path:
    """Four JPEGs of 500 px on the long side from each of the demo's photographs, as class
    folders."""
    for name, file in demo.PHOTOS.items():
        (root / name).mkdir(parents=True)
        image = demo.photo(demo.find(file))
        size = image.width * 500 // demo.LONG, image.height * 500 // demo.LONG
        for i in range(4):
            image.resize(size).save(root / name / f"{i}.jpg", quality=90)
    return root


def measure(
    listing: data.Listing, size: int, images: int, threads: int, rounds: int
) -> dict[str, list[float]]:
    """images/s of each round; a round reads `images` with one graph, then with the other: far more
    than what each prefetches while the other runs."""
    crops = (Crop(size=size),) * 2
    hashed = data.TrainLoader(listing, crops, BATCH, 0, 10**6, 1, threads, CPU)
    reader = pipelines.reader(listing, hashed._order(0), "")
    pipe = pipelines.settings(BATCH, threads, CPU, hashed.placement)
    native = _native(crops, reader, hashed.placement, **pipe)
    run = {"hashed": partial(next, hashed), "native": native.run}
    for batch in run.values():
        for _ in range(4):
            batch()
    arms = {name: partial(seconds, batch, images // BATCH) for name, batch in run.items()}
    took = interleaved(arms, rounds)
    return {name: [BATCH / s for s in values] for name, values in took.items()}


@pipeline_def(enable_conditionals=True)
def _native(crops, reader, placement):
    """The same work on pixels, drawn by fn.random and random_resized_crop."""
    encoded = fn.readers.file(**reader)[0]
    image = fn.decoders.image(
        encoded, device="cpu", output_type=types.RGB, adjust_orientation=False
    )
    views = []
    for crop in crops:
        x = fn.random_resized_crop(
            image,
            size=[crop.size, crop.size],
            random_area=crop.scale,
            random_aspect_ratio=crop.ratio,
        )
        views.append(graph._augment(x, crop, _drawn(crop), placement))
    return tuple(views)


def _drawn(crop: Crop) -> dict:
    """What a view's augmentation is fed with, by DALI's random operators."""
    low, high = draws.ranges((crop,))
    taps = types.Constant(draws.gaussian(np.float32([crop.blur_sigma[1]]), crop))

    def draw(row: int, col: int):
        return fn.random.uniform(range=[float(low[0, row, col]), float(high[0, row, col])])

    def coin(p: float):
        return fn.random.coin_flip(probability=p, dtype=types.BOOL)

    return dict(
        brightness=draw(draws.LIGHT, 0),
        contrast=draw(draws.LIGHT, 1),
        saturation=draw(draws.COLOUR, 0),
        hue=draw(draws.COLOUR, 1),
        light_first=coin(0.5),
        jitter=coin(crop.jitter_p),
        gray=coin(crop.gray_p),
        blur=coin(crop.blur_p),
        flip=fn.random.coin_flip(probability=crop.flip_p),
        across=taps,
        down=fn.reshape(taps, shape=[-1, 1]),
    )


if __name__ == "__main__":
    sys.exit(main())
