"""The t-SNEs that `fastdisco eval tsne` wrote, side by side: the same image is linked in all."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastdisco import data
from fastdisco.common.errors import UserError
from fastdisco.common.files import read_json
from fastdisco.data import Listing
from fastdisco.evals import tsne
from fastdisco.evals.results import comparable
from fastdisco.report.collect import Run
from fastdisco.report.scale import Scale
from fastdisco.report.tiles import Sheet

SIDE = 300
# Images that are shown at most: the file stays small.
MOST = 1000


@dataclass(frozen=True)
class Map:
    name: str
    points: list[tuple[float, float]]  # places in the drawing
    said: str  # how well it keeps neighbours
    raw: dict[str, Any]  # its entry in the file


@dataclass(frozen=True)
class Maps:
    text: str  # what is shown, or why nothing is
    maps: list[Map] = field(default_factory=list)
    classes: list[dict[str, Any]] = field(default_factory=list)  # label, name, colour
    # {"name", "label", "tile": number or None} for each point.
    images: list[dict[str, Any]] = field(default_factory=list)

    @property
    def colours(self) -> list[str]:
        """Of each point."""
        of = {c["label"]: c["colour"] for c in self.classes}
        return [of[i["label"]] for i in self.images]

    def json(self) -> dict[str, Any]:
        return {
            "classes": self.classes,
            "images": self.images,
            "networks": [m.raw for m in self.maps],
        }


def read(runs: Sequence[Run], sheet: Sheet) -> Maps:
    """The newest file with the most networks; where each run has a map of its own, of the same images,
    these are put together."""
    command = " ".join(["fastdisco eval tsne", *(str(r.folder) for r in runs)])
    files, damaged = _files(runs)
    if not files:
        return Maps(f"{damaged}No t-SNE yet: {command}.")
    run, first = max(files, key=lambda f: len(f[1]["networks"]))
    networks = list(first["networks"])
    if len(networks) == 1:
        networks += _alike(run, first, files)
    listing, lacking = _listing(run)
    whole = len(first["images"])
    every = -(-whole // MOST)
    images = [
        {"name": i["name"], "label": i["label"], "tile": _tile(i["name"], listing, sheet)}
        for i in first["images"][::every]
    ]
    networks = [n | {"coordinates": n["coordinates"][::every]} for n in networks]
    shown = f"{whole} validation images"
    if every > 1:
        shown = f"{len(images)} of {shown}, one in {every}"
    text = f"{damaged}{shown}. {lacking}"
    if len(networks) == 1:
        text += f" One map alone: {command} draws all side by side."
    return Maps(text.strip(), _drawn(networks), first["classes"], images)


def _files(runs: Sequence[Run]) -> tuple[list[tuple[Run, dict[str, Any]]], str]:
    """(run, content), the newest first; and a sentence on those that are damaged."""
    found, bad = [], []
    for folder in dict.fromkeys(run.folder for run in runs):
        run = next(r for r in runs if r.folder == folder)
        for path in (folder / "eval").rglob("tsne-*.coordinates.json"):
            content = _content(path)
            if content:
                found.append((path.stat().st_mtime_ns, str(path), run, content))
            else:
                bad.append(path.name)
    found.sort(key=lambda f: f[:2], reverse=True)
    said = f"{', '.join(sorted(bad))}: cannot be read and left out. " if bad else ""
    return [(run, content) for _, _, run, content in found], said


def _content(path: Path) -> dict[str, Any] | None:
    """None of a file that is no map."""
    try:
        found = read_json(path)
        images = len(found["images"])
        labels = {c["label"] for c in found["classes"] if c["colour"] and c["name"] is not None}
        whole = images and all(i["name"] and i["label"] in labels for i in found["images"])
        for n in found["networks"]:
            points = np.asarray(n["coordinates"], float)
            kept = n["values"]["tsne_knn_preservation"], n["values"]["tsne_trustworthiness"]
            whole &= points.shape == (images, 2) and bool(np.isfinite(points).all())
            whole &= bool(n["name"]) and bool(np.isfinite(kept).all())
        whole &= bool(found["networks"]) and isinstance(found["protocol"], dict)
        return found if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _alike(
    run: Run, first: dict[str, Any], files: Sequence[tuple[Run, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The other runs' maps of the same images, the newest of each, turned to lie on the first."""
    reference = np.asarray(first["networks"][0]["coordinates"])
    own, seen, found = _protocol(first), {run.folder}, []
    for other, content in files:
        alone = len(content["networks"]) == 1
        if other.folder in seen or not alone or content["images"] != first["images"]:
            continue
        if _protocol(content) != own:
            continue
        seen.add(other.folder)
        (one,) = content["networks"]
        points, disparity = tsne.aligned(np.asarray(one["coordinates"]), reference)
        rounded = [[round(float(v), 5) for v in p] for p in points]
        found.append(one | {"coordinates": rounded, "disparity": disparity})
    return found


def _protocol(content: dict[str, Any]) -> dict[str, Any]:
    return comparable({k: v for k, v in content["protocol"].items() if k != "networks"})


def _listing(run: Run) -> tuple[Listing | None, str]:
    if run.cfg.data.val is None:
        return None, "Without data.val there are no thumbnails."
    try:
        return data.listing(
            run.at(run.cfg.data.val), run.cfg.data.quarantine, True, run.cfg.data
        ), ""
    except UserError as e:
        return None, f"There are no thumbnails: {e}."


def _tile(name: str, listing: Listing | None, sheet: Sheet) -> int | None:
    index = listing.number.get(name) if listing else None
    return sheet.add(listing, index) if listing and index is not None else None


def _drawn(networks: Sequence[dict[str, Any]]) -> list[Map]:
    """One scale for all: they are aligned to each other."""
    reach = 1.05 * max(float(np.abs(n["coordinates"]).max()) for n in networks)
    across, up = Scale(-reach, reach, 0, SIDE), Scale(-reach, reach, SIDE, 0)
    found = []
    for n in networks:
        values = n["values"]
        said = (
            f"neighbours kept {values['tsne_knn_preservation']:.1%}, trustworthiness "
            f"{values['tsne_trustworthiness']:.3f}"
        )
        points = [(across.at(x), up.at(y)) for x, y in n["coordinates"]]
        found.append(Map(n["name"], points, said, n))
    return found
