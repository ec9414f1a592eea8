"""The images that bench/loader.py reads."""

import tarfile
from pathlib import Path

import numpy as np
import skimage.data
from harness.synthetic import jpeg
from PIL import Image

FILES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
# Width and height in pixels, as often as ImageNet has them.
SIZES = (
    [(500, 375)] * 13 + [(375, 500)] * 4 + [(500, 333)] * 4 + [(333, 500), (640, 480), (1024, 768)]
)


def photographs(root: Path, source: Path | None) -> tuple[Path, str]:
    """Class folders of JPEGs, and what they are.

    source  a folder, which is used as it is; a tar, whose files are written to root; or None: then
            root gets 240 synthetic photographs"""
    if source and source.is_dir():
        return source, source.name
    (root / "a").mkdir(parents=True)
    if source:
        with tarfile.open(source) as tar:
            for member in tar:
                if member.isfile():
                    path = root / "a" / Path(member.name).name
                    path.write_bytes(tar.extractfile(member).read())
        return root, source.name
    rng, near = np.random.default_rng(0), Path(skimage.data.__file__).parent
    for i in range(240):
        photo = Image.open(near / FILES[i % len(FILES)]).convert("RGB")
        width, height = SIZES[i % len(SIZES)]
        left, top = rng.integers(0, photo.width // 4), rng.integers(0, photo.height // 4)
        box = left, top, left + photo.width * 3 // 4, top + photo.height * 3 // 4
        pixels = np.asarray(photo.crop(box).resize((width, height)), float)
        noisy = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        # As many bytes a pixel as ImageNet's files have.
        image = jpeg(Image.fromarray(noisy), width * height * 107 / 187.5)
        (root / "a" / f"{i:03}.jpg").write_bytes(image)
    return root, "240 synthetic photographs"
