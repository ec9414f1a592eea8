"""Images like photographs from the web, and teachers with random weights: what a bench trains on
where its user gives nothing."""

import io
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

# The demo's photographs that are in colour.
PHOTOS = (
    "astronaut",
    "chelsea",
    "china",
    "coffee",
    "flower",
    "hubble",
    "immuno",
    "motorcycle",
    "retina",
    "rocket",
)
# Images that are encoded; the rest are links to them.
DISTINCT = 256
# Width and height in pixels; the first is ImageNet's median.
SIZES = (
    (500, 375),
    (500, 375),
    (500, 375),
    (375, 500),
    (500, 333),
    (500, 400),
    (640, 480),
    (333, 500),
)
# The median size of a file.
BYTES = 107_000


def jpegs(root: Path, images: int, scale: float = 1.0) -> None:
    """Writes class folders of JPEGs like photographs from the web.

    They are random pieces of photographs at ImageNet's sizes, with a camera's grain.  Each is
    encoded at the quality that gives its share of a log-normal spread of file sizes about BYTES.
    scale multiplies width and height."""
    from fastdisco.data import demo

    rng = np.random.default_rng(0)
    sources = [Image.open(demo.find(demo.PHOTOS[name])).convert("RGB") for name in PHOTOS]
    distinct = min(images, DISTINCT)
    sizes = BYTES * scale**2 * np.exp(0.4 * rng.standard_normal(distinct))
    draws = [(i, rng.integers(2**31), float(sizes[i])) for i in range(distinct)]

    def encode(draw: tuple[int, int, float]) -> Path:
        i, seed, size = draw
        image = _piece(sources[i % len(sources)], np.random.default_rng(seed), scale)
        path = root / PHOTOS[i % len(PHOTOS)] / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(image, size))
        return path

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = list(pool.map(encode, draws))
    for i in range(distinct, images):
        first = made[i % distinct]
        os.link(first, first.with_name(f"{i:05}.jpg"))


def zones(root: Path, images: int, classes: int, seed: int, scale: float = 1.0) -> None:
    """Writes class folders of JPEGs, all different: a class is a zone of a photograph, an image a
    random piece of it with a camera's grain.  Equal seeds write equal images.

    images  in all, dealt to the classes in turn
    scale   multiplies width and height, as in `jpegs`"""
    from fastdisco.data import demo

    sources = [Image.open(demo.find(demo.PHOTOS[name])).convert("RGB") for name in PHOTOS]
    zone = [_zone(sources[c % len(PHOTOS)], c // len(PHOTOS)) for c in range(classes)]

    def encode(i: int) -> None:
        rng = np.random.default_rng((seed, i))
        path = root / f"class{i % classes:03}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        _piece(zone[i % classes], rng, scale).save(path, quality=85)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(encode, range(images)))


def _zone(photo: Image.Image, number: int) -> Image.Image:
    """A half of the photograph's width and height, at one of 5 x 5 places."""
    across, down = number % 5, number // 5 % 5
    left, top = photo.width * across // 8, photo.height * down // 8
    return photo.crop((left, top, left + photo.width // 2, top + photo.height // 2))


def _piece(photo: Image.Image, rng: np.random.Generator, scale: float) -> Image.Image:
    """A random piece of a photograph, at one of SIZES, with grain."""
    width, height = (round(s * scale) for s in SIZES[rng.integers(len(SIZES))])
    zoom = min(photo.width / width, photo.height / height) * rng.uniform(0.6, 1.0)
    w, h = width * zoom, height * zoom
    left, top = rng.uniform(0, photo.width - w), rng.uniform(0, photo.height - h)
    box = (left, top, left + w, top + h)
    piece = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    grain = rng.normal(0, rng.uniform(1, 5), (height, width, 1)).astype(np.float32)
    pixels = (np.asarray(piece, np.float32) + grain).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def jpeg(image: Image.Image, size: float) -> bytes:
    """The image as a JPEG of the lowest quality, from 30 to 98, that gives `size` bytes or more."""

    def encoded(quality: int) -> bytes:
        f = io.BytesIO()
        image.save(f, "JPEG", quality=quality)
        return f.getvalue()

    low, high = 30, 98
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(encoded(middle)) >= size else (middle + 1, high)
    return encoded(low)


def random_teacher(
    file: Path,
    arch: str,
    head: Callable,
    backbone_keys: str = "module.encoder_q.",
    head_keys: str = "module.encoder_q.fc.",
    wrapped: str | None = "state_dict",
) -> None:
    """Writes a teacher's checkpoint of random weights, whose batch norms have the statistics of
    its own activations, as after a training.

    head            makes the head for the backbone's number of features
    *_keys, wrapped names in the file, by default those of MoCo-v2"""
    import timm
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from fastdisco import models

    torch.manual_seed(0)
    net = models.create(arch, head).train()
    for m in net.modules():
        if isinstance(m, _BatchNorm):
            # The mean over all that it sees.
            m.momentum = None
            if not m.weight.any():
                # timm begins some at zero: nothing would flow, and zeros cost a device less power.
                torch.nn.init.ones_(m.weight)
    own = timm.get_pretrained_cfg(arch)
    size = own.input_size[-1] if own and own.fixed_input_size else 64
    with torch.no_grad():
        net([torch.randn(8, 3, size, size)])
    state = {
        re.sub("^head[.]", head_keys, re.sub("^backbone[.]", backbone_keys, k)): v
        for k, v in net.state_dict().items()
    }
    torch.save({wrapped: state} if wrapped else state, file)
