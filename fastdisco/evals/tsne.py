"""Maps of features in two dimensions, as in Figure 3 of DisCo: which images they show, the map itself
(t-SNE, UMAP), its alignment to another one, and how well it keeps neighbours.

Letters: N images, F features, C classes."""

import importlib.metadata
import importlib.util
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdisco import data
from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.evals.settings import Tsne

# The classes of the official code: positions in the list of classes.
PAPER = tuple(range(5, 15))
PERPLEXITY = 30.0
# Rows of distances in memory at a time.
ROWS = 256
# Images up to which openTSNE looks for exact neighbours.
EXACT = 10_000
# Who makes a map, and what pip calls it.
PACKAGES = {"tsne": "scikit-learn", "opentsne": "openTSNE", "umap": "umap-learn"}
_MODULES = {"tsne": "sklearn", "opentsne": "openTSNE", "umap": "umap"}


class Chosen(NamedTuple):
    """The images of a map."""

    indices: np.ndarray  # [N] int64, ascending
    classes: list[int]  # positions in the listing, ascending
    remarks: list[str]  # what differs from what was asked for, or from the paper


class Map(NamedTuple):
    """One network's."""

    name: str
    network: dict[str, Any]  # fingerprint, architecture, source
    points: np.ndarray  # [N,2] float64
    values: dict[str, float]
    # Procrustes distance to the first map, 0 (the same up to rotation, reflection and scale) to 1.
    disparity: float


# ---- which images


def choose(listing: data.Listing, s: Tsne) -> Chosen:
    """The first `s.images` images of each class that the settings name; of data without classes the
    first 10 x `s.images`.

    Raises UserError where a class is not there, or the images are fewer than the map needs."""
    kept = listing.kept
    label = listing.labels[kept]
    there = np.unique(label).tolist()
    remarks: list[str] = []
    if len(there) == 1:
        if s.classes or s.drawn:
            raise UserError(
                f"tsne: all images of {listing.source} are of one class, so none can be chosen; leave "
                "tsne.classes and tsne.drawn out, or give images with classes"
            )
        indices, classes = kept[: len(PAPER) * s.images], there
        remarks.append(
            f"tsne: {listing.source} has one class, so the map shows its first {len(indices)} images "
            "in one colour"
        )
    else:
        classes = _classes(listing, there, s, remarks)
        firsts = [kept[label == c][: s.images] for c in classes]
        indices = np.sort(np.concatenate(firsts))
        if few := [listing.classes[c] for c, f in zip(classes, firsts) if len(f) < s.images]:
            fewest = min(map(len, firsts))
            remarks.append(
                f"tsne: {len(few)} of the {len(classes)} classes have fewer than {s.images} images "
                f"(the fewest: {fewest}), and the map shows all that they have"
            )
    _refuse_few(len(indices), s)
    if s.perplexity is None and s.method != "umap" and perplexity(s, len(indices)) < PERPLEXITY:
        remarks.append(
            f"tsne: perplexity {perplexity(s, len(indices)):g} in place of {PERPLEXITY:g}, a third of "
            f"the {len(indices)} images"
        )
    return Chosen(indices, classes, remarks)


def perplexity(s: Tsne, images: int) -> float:
    """The one that is used: what was asked for, or 30, or less where there are few images."""
    return s.perplexity or min(PERPLEXITY, (images - 1) // 3)


def _classes(listing: data.Listing, there: list[int], s: Tsne, remarks: list[str]) -> list[int]:
    """Positions, ascending.  there: the classes that have images."""
    if s.classes:
        return sorted({_position(listing, there, c) for c in s.classes})
    if s.drawn:
        if s.drawn > len(there):
            raise UserError(
                f"tsne.drawn: {s.drawn} classes are more than the {len(there)} of {listing.source}; "
                "draw fewer"
            )
        order = np.random.default_rng(s.seed).permutation(len(there))
        return sorted(there[i] for i in order[: s.drawn])
    if set(PAPER) <= set(there):
        return list(PAPER)
    first = there[: len(PAPER)]
    remarks.append(
        f"tsne: {listing.source} has {len(there)} classes, so the first {len(first)} stand for the "
        "paper's, which are at the positions 5 to 14"
    )
    return first


def _position(listing: data.Listing, there: list[int], asked: int | str) -> int:
    names = listing.classes
    found = names.index(asked) if isinstance(asked, str) and asked in names else asked
    if found not in there:
        raise UserError(
            f"tsne.classes: {asked} is no class of {listing.source}, which has {shorten(names)}; give "
            f"names, or positions from 0 to {len(names) - 1}"
        )
    return int(found)


def _refuse_few(images: int, s: Tsne) -> None:
    if images <= 2 * s.k:
        raise UserError(
            f"tsne: {images} images are too few for the {s.k} neighbours by which a map is judged; give "
            f"more than {2 * s.k} images, or a smaller tsne.k"
        )
    if s.perplexity is not None and s.perplexity >= images:
        raise UserError(
            f"tsne.perplexity: {s.perplexity:g} is not below the {images} images; give a smaller one"
        )
    if s.method == "umap" and s.neighbours >= images:
        raise UserError(
            f"tsne.neighbours: {s.neighbours} is not below the {images} images; give fewer"
        )


# ---- the map


def refuse_absent(method: str) -> None:
    """Raises UserError where what makes the map is not installed."""
    if importlib.util.find_spec(_MODULES[method]) is None:
        package = PACKAGES[method]
        raise UserError(
            f"tsne.method: {method} needs {package}, which is not installed; pip install {package}, or "
            "take tsne.method=tsne"
        )


def version(method: str) -> str:
    """Of the package that makes the map."""
    return importlib.metadata.version(PACKAGES[method])


def fit(x: np.ndarray, s: Tsne) -> np.ndarray:
    """[N,F] float32 -> [N,2] float64: the same bytes for the same features.

    The features are taken as they are, not normalised, as in the official code."""
    from threadpoolctl import threadpool_limits

    makers: dict[str, Callable[[np.ndarray, Tsne], Any]] = {
        "tsne": _sklearn,
        "opentsne": _opentsne,
        "umap": _umap,
    }
    # Threads add in any order, and what differs in the last bit is another map in the end.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(makers[s.method](x, s), np.float64)


def _sklearn(x: np.ndarray, s: Tsne) -> Any:
    from sklearn.manifold import TSNE

    t = TSNE(2, perplexity=perplexity(s, len(x)), init="pca", random_state=s.seed)
    return t.fit_transform(x)


def _opentsne(x: np.ndarray, s: Tsne) -> Any:
    import openTSNE

    near = "exact" if len(x) <= EXACT else "auto"
    common = {"initialization": "pca", "random_state": s.seed, "n_jobs": 1, "neighbors": near}
    return openTSNE.TSNE(perplexity=perplexity(s, len(x)), **common).fit(x)


def _umap(x: np.ndarray, s: Tsne) -> Any:
    import umap

    t = umap.UMAP(n_neighbors=s.neighbours, init="pca", random_state=s.seed, n_jobs=1)
    return t.fit_transform(x)


# ---- its alignment


def standard(y: np.ndarray) -> np.ndarray:
    """The points around their mean, at a root mean square distance of 1 from it."""
    y = y - y.mean(0)
    return y / np.sqrt(np.square(y).sum(1).mean())


def aligned(y: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, float]:
    """The points, moved, rotated, reflected and scaled as one body to lie on the reference (orthogonal
    Procrustes, Schoenemann 1966), and the Procrustes disparity: 0 where they are the same map, to
    1, the same whichever of the two is moved.

    The scale gives both the same size.  That of least squares would draw a map the smaller, the
    less it is like the reference.

    y, reference  [N,2] each, of the same images in the same order"""
    a, b = standard(y), standard(reference)
    # The R that brings a R nearest to b: with a' b = U S V' it is U V'.
    u, singular, vt = np.linalg.svd(a.T @ b)
    size = np.sqrt(np.square(reference - reference.mean(0)).sum(1).mean())
    disparity = 1 - (singular.sum() / len(a)) ** 2
    return size * a @ (u @ vt) + reference.mean(0), float(max(0.0, disparity))


# ---- how good it is


def run(x: np.ndarray, y: np.ndarray, k: int = 10) -> dict[str, float]:
    """How well a map keeps the neighbours that images have by their features, both by Euclidean
    distance; rotation, reflection and scale of the map change nothing.

    tsne_knn_preservation  share, 0..1, of an image's k nearest in the map that are among its k
                           nearest by features
    tsne_trustworthiness   0..1, 1 where no image is near in the map that is far by features
                           (Venna and Kaski, 2001)

    x, y  [N,F] features and [N,2] points; N more than 2 k"""
    n = len(x)
    assert n > 2 * k
    far, flat = torch.from_numpy(x).double(), torch.from_numpy(y).double()
    kept = penalty = 0.0
    for rows in torch.arange(n).split(ROWS):
        by_features, by_map = (torch.cdist(t[rows], t) for t in (far, flat))
        for d in (by_features, by_map):
            d.scatter_(1, rows[:, None], torch.inf)
        near = by_features.gather(1, by_map.topk(k, largest=False).indices)
        # The place of each neighbour in the map among all by features, from 0.
        place = torch.searchsorted(by_features.sort(1).values, near)
        kept += float((place < k).sum())
        penalty += float((place + 1 - k).clamp(min=0).sum())
    return {
        "tsne_knn_preservation": kept / (n * k),
        "tsne_trustworthiness": 1 - penalty * 2 / (n * k * (2 * n - 3 * k - 1)),
    }


# ---- the file


def write(
    path: Path,
    listing: data.Listing,
    chosen: Chosen,
    maps: Sequence[Map],
    colours: Sequence[str],
    settings: dict[str, Any],
    protocol: dict[str, Any],
    short_hash: str,
) -> None:
    """The coordinates as JSON: image names relative to the data, with their labels, and one list of
    points for each network."""
    names = [listing.classes[c] for c in chosen.classes]
    text = {
        "what": "tsne",
        "hash": short_hash,
        "classes": [
            {"label": c, "name": n, "colour": colour}
            for c, n, colour in zip(chosen.classes, names, colours)
        ],
        "images": [
            {"name": listing.files[i], "label": int(listing.labels[i])} for i in chosen.indices
        ],
        "networks": [
            {
                "name": m.name,
                "network": m.network,
                "values": m.values,
                "disparity": m.disparity,
                "coordinates": [[round(float(v), 5) for v in point] for point in m.points],
            }
            for m in maps
        ],
        "settings": settings,
        "protocol": protocol,
    }
    write_whole(path, json.dumps(text, indent=1) + "\n")
