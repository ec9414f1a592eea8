"""The picture of maps side by side, as PNG and SVG: the same maps give the same bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdisco.data.lines import printable
from fastdisco.evals.tsne import Map

# Inches of one map, and of a line of the legend.
SIDE, LINE = 3.2, 0.22
# Inches of a letter of the legend, and of the mark and gaps around a name; letters of a name.
LETTER, AROUND, LETTERS = 0.07, 0.35, 40


def colours(classes: int) -> list[str]:
    """A colour for each class, as #rrggbb: of matplotlib's tables while they last, then around the
    circle of hues."""
    import matplotlib
    from matplotlib.colors import hsv_to_rgb, to_hex

    name = "tab10" if classes <= 10 else "tab20"
    if classes <= 20:
        return [to_hex(matplotlib.colormaps[name](i)) for i in range(classes)]
    hues = np.arange(classes) / classes
    # Neighbours in the list differ in brightness, too.
    bright = 0.9 - 0.3 * (np.arange(classes) % 2)
    return [to_hex(c) for c in hsv_to_rgb(np.stack([hues, 0 * hues + 0.85, bright], 1))]


def draw(
    path: Path, maps: Sequence[Map], label: np.ndarray, names: dict[int, str], shades: Sequence[str]
) -> None:
    """Writes path.png and path.svg.

    label   [N] of the points
    names   of the classes by label, in the order of the legend; shades: a colour for each"""
    import matplotlib

    # In matplotlib's own style, whatever a user's settings are.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # SVG's names of its parts are random without it.
        matplotlib.rcParams["svg.hashsalt"] = "fastdisco"
        figure = _figure(maps, label, names, shades)
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            part = path.with_name(f".{path.name}.part{suffix}")
            figure.savefig(part, dpi=150, metadata=metadata)
            part.replace(path.with_name(path.name + suffix))


def _figure(
    maps: Sequence[Map], label: np.ndarray, names: dict[int, str], shades: Sequence[str]
) -> Any:
    from matplotlib.figure import Figure

    shown = [_plain(n if len(n) <= LETTERS else n[: LETTERS - 3] + "...") for n in names.values()]
    longest = LETTER * max(map(len, shown)) + AROUND
    columns = min(len(shown), max(1, int(SIDE * len(maps) / longest)))
    lines = -(-len(names) // columns)
    figure = Figure((SIDE * len(maps), SIDE + 0.5 + LINE * lines), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    # One scale for all: they are aligned to each other.
    reach = 1.05 * max(float(np.abs(m.points).max()) for m in maps)
    size = max(2.0, min(12.0, 6000 / len(label)))
    for ax, m in zip(axes, maps):
        for number, shade in zip(names, shades):
            points = m.points[label == number]
            ax.scatter(points[:, 0], points[:, 1], s=size, color=shade, linewidths=0)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        ax.set_title(_plain(m.name), fontsize=10)
        kept, trust = m.values["tsne_knn_preservation"], m.values["tsne_trustworthiness"]
        ax.set_xlabel(f"neighbours kept {kept:.1%}, trustworthiness {trust:.3f}", fontsize=8)
    if len(names) > 1:
        place = "outside lower center"
        tight: dict[str, Any] = {"handletextpad": 0.1, "columnspacing": 1.0, "frameon": False}
        figure.legend(axes[0].collections, shown, loc=place, ncols=columns, fontsize=7, **tight)
    return figure


def _plain(text: str) -> str:
    """A name as it is: between two dollars matplotlib would read a formula."""
    return printable(text).replace("$", r"\$")
