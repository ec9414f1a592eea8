"""The demo's images: "which photograph is this patch from", cut from photographs that scikit-image
and scikit-learn ship."""

import hashlib
import importlib.util
import io
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from fastdisco.common.errors import UserError

# Class -> file in an installed package, opened as a file: the packages' own loaders may download.
PHOTOS = {
    "astronaut": "skimage/data/astronaut.png",
    "brick": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "cell": "skimage/data/cell.png",
    "chelsea": "skimage/data/chelsea.png",
    "china": "sklearn/datasets/images/china.jpg",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "hubble": "skimage/data/hubble_deep_field.jpg",
    "immuno": "skimage/data/ihc.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "page": "skimage/data/page.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
}
LONG = 640  # pixels, long side of a photograph before it is cut
CELL = 96  # pixels; a cell gives patches to train or to val, never to both
PATCH = 32, 80  # pixels, shortest and longest side of a patch before it is resized
SIZE = 32  # pixels, side of the images written
MANIFEST = "demo.json"


def write(dst: Path | str, seed: int = 0, train: int = 400, val: int = 80) -> dict:
    """dst/{train,val}/<photograph>/NNNN.jpg, `train` and `val` patches of each photograph; returns
    the manifest.

    The same bytes for the same seed.  A folder that holds this very data set is kept as it is.
    UserError for a folder with anything else in it, or a missing photograph."""
    dst = Path(dst)
    photos = {name: find(file) for name, file in PHOTOS.items()}
    wanted = dict(
        seed=seed,
        train=train,
        val=val,
        long=LONG,
        cell=CELL,
        patch=list(PATCH),
        size=SIZE,
        photos={
            name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in photos.items()
        },
    )
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        return _reuse(dst, wanted)
    # Renamed at the end: a killed run leaves no half a data set under the name.
    part = dst.with_name(f".{dst.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for number, (name, path) in enumerate(
        track(photos.items(), "cutting photographs", len(photos), transient=True)
    ):
        image = photo(path)
        rng = np.random.default_rng([seed, number])
        cells = dict(zip(("train", "val"), split_cells(image.size, rng)))
        for half, count in dict(train=train, val=val).items():
            folder = part / half / name
            folder.mkdir(parents=True)
            for i in range(count):
                patch = image.resize(
                    (SIZE, SIZE), Image.Resampling.BICUBIC, box=draw_box(cells[half], rng)
                )
                patch.save(folder / f"{i:04}.jpg", quality=90)
    manifest = wanted | {"sha256": _digest(part)}
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
    part.rename(dst)
    return manifest


def photo(path: Path) -> Image.Image:
    """RGB, long side LONG pixels."""
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    scale = LONG / max(image.size)
    return image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )


def split_cells(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Upper left corners [n,2] (x, y) of the whole cells of a width x height image: those for
    train, and a quarter (at least 2) for val."""
    corners = np.stack(
        np.meshgrid(*(np.arange(n // CELL) * CELL for n in size), indexing="ij"), -1
    ).reshape(-1, 2)
    rng.shuffle(corners)
    held = max(2, len(corners) // 4)
    return corners[held:], corners[:held]


def draw_box(cells: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) of a random square that lies within one random cell."""
    side = int(rng.integers(PATCH[0], PATCH[1] + 1))
    left, upper = cells[rng.integers(len(cells))] + rng.integers(0, CELL - side + 1, 2)
    return int(left), int(upper), int(left) + side, int(upper) + side


def find(file: str) -> Path:
    """Where a photograph of PHOTOS is installed.  Raises UserError where it is not."""
    package, inside = file.split("/", 1)
    path = Path(importlib.util.find_spec(package).origin).parent / inside
    if not path.is_file():
        raise UserError(
            f"{path}: this photograph is not in the installed {package}, nor is it fetched; install "
            "a release that ships it (scikit-image 0.26 and scikit-learn 1.9 do)"
        )
    return path


def _reuse(dst: Path, wanted: dict) -> dict:
    try:
        found = json.loads((dst / MANIFEST).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{dst}: not empty and not written by this command; give an empty or new folder"
        ) from None
    differ = [key for key, value in wanted.items() if found.get(key) != value]
    if differ:
        raise UserError(
            f"{dst}: holds the demo data of another {', '.join(differ)}; give a new folder, or "
            "remove this one"
        )
    if found["sha256"] != _digest(dst):
        raise UserError(
            f"{dst}: its files are not those that {MANIFEST} there was written for; remove the "
            "folder and write it again"
        )
    return found


def _digest(root: Path) -> str:
    """sha256 over the names and bytes of all images under root."""
    h = hashlib.sha256()
    for path in sorted(root.rglob("*.jpg")):
        h.update(path.relative_to(root).as_posix().encode() + b"\0")
        h.update(path.read_bytes())
    return h.hexdigest()
