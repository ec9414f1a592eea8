"""The demo's images: "which photograph is this patch from", cut from photographs that scikit-image
and scikit-learn ship.  This is `fastdisco data demo`.

Patches for train and for val come from different cells of a photograph, so they never overlap.  They
may have a light of their own each: else colour tells most photographs apart, and networks that have
learned nothing do nearly as well as others."""

import hashlib
import importlib.util
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from fastdisco.common.errors import UserError
from fastdisco.common.files import read_json

# Class -> file in an installed package.  We open the file itself, since the packages' own loaders
# may download.
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
CELL = 96  # pixels, side of a cell, which gives patches to train or to val, never to both
PATCH = 32, 80  # pixels, shortest and longest side of a patch before it is resized
SIZE = 32  # pixels, side of the images written
MANIFEST = "demo.json"


def write(
    dst: Path | str, seed: int = 0, train: int = 400, val: int = 80, light: float = 0.0
) -> dict[str, Any]:
    """Writes dst/{train,val}/<photograph>/NNNN.jpg, `train` and `val` patches of each photograph.
    Returns the manifest.

    light  deviation of the logarithm of a patch's brightness; each colour differs by half of it; 0:
           the photographs' own light

    The same seed gives the same bytes.  A folder that holds this very data set is kept as it is.
    Raises UserError for a folder with anything else in it, or a missing photograph."""
    dst = Path(dst)
    photos = {name: find(file) for name, file in PHOTOS.items()}
    counts = dict(train=train, val=val)
    wanted = dict(
        seed=seed,
        **counts,
        long=LONG,
        cell=CELL,
        patch=list(PATCH),
        size=SIZE,
        light=light,
        photos={name: _sha256(path.read_bytes()) for name, path in photos.items()},
    )
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        return _reuse(dst, wanted)
    # Renamed at the end, so that a killed run leaves no half of a data set under the name.
    part = dst.with_name(f".{dst.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    steps = track(photos.items(), "cutting photographs", len(photos), transient=True)
    for number, (name, path) in enumerate(steps):
        _cut(part, name, photo(path), counts, [seed, number], light)
    manifest = wanted | {"sha256": _digest(part)}
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
    part.rename(dst)
    return manifest


def photo(path: Path) -> Image.Image:
    """A photograph in RGB, its long side LONG pixels."""
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    scale = LONG / max(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return image.resize(size, Image.Resampling.BICUBIC)


def split_cells(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Upper left corners [n,2] (x, y) of the whole cells of a width x height image: those for
    train, and a quarter of all (at least 2) for val."""
    # A strip that is narrower than a cell is left out, at the right and below.
    sides = [np.arange(n // CELL) * CELL for n in size]
    corners = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 2)
    rng.shuffle(corners)
    held_out = max(2, len(corners) // 4)
    return corners[held_out:], corners[:held_out]


def draw_box(cells: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) of a random square that lies within one random cell."""
    side = int(rng.integers(PATCH[0], PATCH[1] + 1))
    left, upper = cells[rng.integers(len(cells))] + rng.integers(0, CELL - side + 1, 2)
    return int(left), int(upper), int(left) + side, int(upper) + side


def relight(patch: Image.Image, light: float, rng: np.random.Generator) -> Image.Image:
    """The patch in a random light: each colour multiplied by a number, so that nothing is brighter
    than white."""
    gain = np.exp(rng.normal(0, light) + rng.normal(0, light / 2, 3))
    lit = np.asarray(patch, np.float64) * gain
    lit *= min(1.0, 255 / max(lit.max(), 1.0))
    return Image.fromarray(lit.round().astype(np.uint8))


def find(file: str) -> Path:
    """Where a photograph of PHOTOS is installed.  Raises UserError where it is not."""
    package, inside = file.split("/", 1)
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{package}: is not installed, and has photographs of the demo; install it")
    path = Path(spec.origin).parent / inside
    if not path.is_file():
        raise UserError(
            f"{path}: this photograph is not in the installed {package}, nor is it fetched; install "
            "a release that ships it (scikit-image 0.26 and scikit-learn 1.9 do)"
        )
    return path


def _cut(
    root: Path,
    name: str,
    image: Image.Image,
    counts: dict[str, int],
    seed: list[int],
    light: float,
) -> None:
    """Writes the patches of one photograph, as many as `counts` says for train and for val."""
    # Places and lights are drawn apart: another light leaves the places as they are.
    rng, lights = np.random.default_rng(seed), np.random.default_rng([*seed, 1])
    cells = dict(zip(counts, split_cells(image.size, rng)))
    for half, count in counts.items():
        folder = root / half / name
        folder.mkdir(parents=True)
        for i in range(count):
            box = draw_box(cells[half], rng)
            patch = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
            if light:
                patch = relight(patch, light, lights)
            patch.save(folder / f"{i:04}.jpg", quality=90)


def _reuse(dst: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a folder that holds this very data set.  Raises UserError for any other."""
    try:
        found = read_json(dst / MANIFEST)
        if not isinstance(found, dict):
            raise ValueError("no manifest")
    except (OSError, ValueError):
        raise UserError(
            f"{dst}: not empty and not written by this command; give an empty or new folder"
        ) from None
    # Manifests of before say nothing of the light.
    found = {"light": 0.0} | found
    differ = [key for key, value in wanted.items() if found.get(key) != value]
    if differ:
        raise UserError(
            f"{dst}: holds the demo data of another {', '.join(differ)}; give a new folder, or "
            "remove this one"
        )
    if found.get("sha256") != _digest(dst):
        raise UserError(
            f"{dst}: its files are not those that {MANIFEST} there was written for; remove the "
            "folder and write it again"
        )
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(root: Path) -> str:
    """SHA-256 over the names and bytes of all images under root."""
    h = hashlib.sha256()
    for path in sorted(root.rglob("*.jpg")):
        h.update(path.relative_to(root).as_posix().encode() + b"\0")
        h.update(path.read_bytes())
    return h.hexdigest()
