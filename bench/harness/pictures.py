"""Pictures of results.

A bench has a picture where bench/pictures/ has a module of its name, with draw(result), which makes
the figure from what the JSON file holds and from nothing else.  The PNG file carries the SHA-256 of
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


def write(result: Path) -> Path | None:
    """Draws the picture beside the result's JSON file; None where the bench has none."""
    if (image := drawn(result)) is None:
        return None
    path = result.with_suffix(".png")
    path.write_bytes(image)
    return path


def drawn(result: Path) -> bytes | None:
    """The PNG of a result's JSON file, the same bytes each time; None where the bench has none."""
    content = json.loads(result.read_text())
    if find_spec(f"pictures.{content['bench']}") is None:
        return None
    figure = importlib.import_module(f"pictures.{content['bench']}").draw(content)
    return png(figure, {DRAWN_FROM: sha256(result)})


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
    """The pictures in the folder that are missing, or that show another JSON file than the one
    beside them, or none."""
    wanted = {p.with_suffix(".png"): p for p in sorted(results.glob("*.json")) if _has_picture(p)}
    found = sorted({*wanted, *results.glob("*.png")})
    return [p.name for p in found if p not in wanted or _source(p) != sha256(wanted[p])]


def _has_picture(result: Path) -> bool:
    return find_spec(f"pictures.{json.loads(result.read_text())['bench']}") is not None


def _source(picture: Path) -> str | None:
    from PIL import Image

    if not picture.exists():
        return None
    with Image.open(picture) as image:
        return image.info.get(DRAWN_FROM)
