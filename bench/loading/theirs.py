"""The training's views by torchvision in a DataLoader: the comparison of bench/loader.py."""

import functools
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from fastdisco import data
from fastdisco.config import Crop

CROP = Crop()


def torchvision(root: Path, batch: int, threads: int, kind: str) -> tuple[Iterator, int]:
    """Batches without end, and how many are ready at most.  The parameters of a view have the same
    distributions as ours.

    kind  "pil" or "v2", as `Views` says"""
    files = [str(root / f) for f in data.listing(root).files]
    images = torch.utils.data.DataLoader(
        Views(files, kind),
        batch,
        num_workers=threads,
        sampler=Endless(len(files)),
        multiprocessing_context="fork",
    )
    return iter(images), 2 * threads


class Endless(torch.utils.data.Sampler):
    """One permutation of n images after another."""

    def __init__(self, n: int):
        self.n = n

    def __iter__(self) -> Iterator[int]:
        for epoch in itertools.count():
            yield from random.Random(epoch).sample(range(self.n), self.n)


class Views(torch.utils.data.Dataset):
    """Two views of an image by torchvision's transforms: on PIL images (pil), as MoCo-v2 has them,
    or on tensors (v2)."""

    def __init__(self, files: list[str], kind: str):
        from torchvision import io as images
        from torchvision import transforms as v1
        from torchvision.transforms import v2

        self.files = files
        if kind == "pil":
            t, blur, last, self.read = v1, pil_blur, v1.ToTensor(), pil_image
        else:
            t, last = v2, v2.ToDtype(torch.float32, scale=True)
            taps = 2 * int(np.ceil(3 * CROP.blur_sigma[1])) + 1
            blur = v2.GaussianBlur(taps, CROP.blur_sigma)
            self.read = functools.partial(images.decode_image, mode=images.ImageReadMode.RGB)
        steps = [
            t.RandomResizedCrop(CROP.size, CROP.scale, CROP.ratio, antialias=True),
            t.RandomApply([t.ColorJitter(*CROP.jitter)], CROP.jitter_p),
            t.RandomGrayscale(CROP.gray_p),
            t.RandomApply([blur], CROP.blur_p),
            t.RandomHorizontalFlip(CROP.flip_p),
            last,
            t.Normalize(CROP.mean, CROP.std),
        ]
        self.view = t.Compose(steps)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple:
        image = self.read(self.files[i])
        return self.view(image), self.view(image), i


def pil_image(file: str) -> Image.Image:
    with open(file, "rb") as f:
        return Image.open(f).convert("RGB")


def pil_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*CROP.blur_sigma)))
