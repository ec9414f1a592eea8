"""Pictures of results.

A bench has a picture where bench/pictures/ has a module of its name, with draw(result), which makes
the figure from what the JSON file holds and from nothing else; or drawings(result), which makes
several by name.  The PNG file carries the SHA-256 of
that JSON file, so a picture of an older run is told by its bytes."""

import hashlib
import importlib
import io
import json
from importlib.util import find_spec
from pathlib import Path

# The key of the PNG's text that holds the SHA-256 of the JSON file.
DRAWN_FROM = "Drawn from the JSON file of SHA-256"
DPI = 120


def write(result: Path) -> list[Path]:
    """Draws the pictures beside the result's JSON file; none where the bench has none."""
    found = drawn(result)
    for path, image in found.items():
        path.write_bytes(image)
    return list(found)


def drawn(result: Path) -> dict[Path, bytes]:
    """The PNGs of a result's JSON file by their paths, the same bytes each time."""
    content = json.loads(result.read_text())
    if find_spec(f"pictures.{content['bench']}") is None:
        return {}
    module = importlib.import_module(f"pictures.{content['bench']}")
    text = {DRAWN_FROM: sha256(result)}
    if not hasattr(module, "drawings"):
        return {result.with_suffix(".png"): png(module.draw(content), text)}
    beside = lambda name: result.with_name(f"{result.stem}-{name}.png")
    return {beside(name): png(made, text) for name, made in module.drawings(content).items()}


def png(figure, text: dict[str, str]) -> bytes:
    """A matplotlib figure as PNG, with these texts in it and no version of matplotlib."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None, **text})
    return file.getvalue()


def figure(rows: int, columns: int, width: float, height: float, sharey: bool = False):
    """(figure, axes [rows,columns]) in matplotlib's own style, whatever a user's settings are;
    width and height in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()
    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False, sharey=sharey)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stale(results: Path) -> list[str]:
    """The pictures in the folder that are missing, or that show another JSON file than theirs, or
    none."""
    digests = {p: sha256(p) for p in sorted(results.glob("*.json"))}
    wanted = {path: digests[p] for p in digests for path in names(p)}
    found = sorted({*wanted, *results.glob("*.png")})
    return [p.name for p in found if p not in wanted or _source(p) != wanted[p]]


def names(result: Path) -> list[Path]:
    """The paths of the pictures that a result's JSON file should have."""
    content = json.loads(result.read_text())
    if find_spec(f"pictures.{content['bench']}") is None:
        return []
    module = importlib.import_module(f"pictures.{content['bench']}")
    if not hasattr(module, "drawings"):
        return [result.with_suffix(".png")]
    return [result.with_name(f"{result.stem}-{name}.png") for name in module.drawings(content)]


def _source(picture: Path) -> str | None:
    from PIL import Image

    if not picture.exists():
        return None
    with Image.open(picture) as image:
        return image.info.get(DRAWN_FROM)
