"""Nearest images in each network side by side: where they disagree most, and the classes that are
furthest behind the teacher."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco import data
from fastdisco.common.errors import UserError
from fastdisco.data import Listing
from fastdisco.evals import health, passes, tsne
from fastdisco.evals.features import Features, gathered
from fastdisco.evals.neighbours import nearest
from fastdisco.evals.results import comparable
from fastdisco.evals.settings import Tsne
from fastdisco.report.collect import Run
from fastdisco.report.networks import DISTILLED, TEACHER, Network
from fastdisco.report.tiles import Sheet

# Neighbours that are shown and compared; queries of each kind.
NEAR, QUERIES = 8, 4
# Neighbours that vote for a class, as in training.
VOTES, TEMP = 20, 0.07
# Rows of the table of classes at most.
CLASSES = 30
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    network: str
    images: list[str]
    tiles: list[int]
    same: list[bool]  # whether a neighbour has the query's class
    shared: int | None  # how many are also the reference's; None of the reference itself


@dataclass(frozen=True)
class Query:
    image: str
    tile: int
    label: str
    rows: list[Row]


@dataclass(frozen=True)
class Gap:
    """Accuracies of the classes, the furthest behind the teacher first."""

    networks: list[str]
    # (class, accuracy of the teacher, of each network), 0..1
    rows: list[tuple[str, list[float]]]
    text: str = ""  # by which images


@dataclass(frozen=True)
class Strips:
    text: str
    usual: list[Query] = field(default_factory=list)
    apart: list[Query] = field(default_factory=list)
    gap: Gap | None = None
    no_gap: str = ""  # why there is none

    def json(self) -> dict[str, Any]:
        return {
            "queries": [asdict(q) for q in self.usual],
            "apart": [asdict(q) for q in self.apart],
        }


class Kept:
    """Features by the network's mark: a page that is written anew computes those of new weights."""

    def __init__(self) -> None:
        self._features: dict[tuple[str, str, bytes], Features] = {}

    def of(self, network: Network, run: Run, listing: Listing, indices: np.ndarray) -> Features:
        """[N,F] of the images in the order of the listing, in float32."""
        key = network.mark, str(listing.source), indices.tobytes()
        if key not in self._features:
            net = network.net
            assert net
            view = passes.of_config(run.cfg)
            images = run.cfg.data.model_copy(update={"decode": "auto", "augment": "auto"})
            encode = lambda x: {"features": net.features(x)}
            found = passes.features(encode, listing, indices, view, images, CPU)
            self._features[key] = gathered(found["features"])
        return self._features[key]


def strips(
    runs: Sequence[Run], networks: Sequence[Network], per_class: int, sheet: Sheet, kept: Kept
) -> Strips:
    """Of the images that a t-SNE shows by default, `per_class` of each class."""
    shown = [n for n in networks if n.net is not None]
    leads = ((r, r.cfg.data.val) for r in runs)
    lead, val = next(((r, v) for r, v in leads if v is not None), (None, None))
    if not per_class:
        return Strips("Left out, as asked for by --images 0.")
    if lead is None or val is None:
        return Strips("No run has validation images (data.val), so there are no queries.")
    if not shown:
        return Strips("No run has saved a checkpoint yet, so there is no network to ask.")
    try:
        listing = data.listing(lead.at(val), lead.cfg.data.quarantine, True, lead.cfg.data)
        # k is that of a map, which would ask for more images.
        chosen = tsne.choose(listing, Tsne(images=per_class, k=1)).indices
        found = [kept.of(n, lead, listing, chosen) for n in shown]
    except (UserError, OSError, RuntimeError) as e:
        return Strips(f"The nearest images cannot be found: {e}")
    return _strips(shown, found, listing, sheet)


def _strips(
    shown: Sequence[Network], found: Sequence[Features], listing: Listing, sheet: Sheet
) -> Strips:
    near = [_others(f.x, min(NEAR, len(f.x) - 1)) for f in found]
    label = found[0].label
    ask = lambda row: _query(row, shown, near, found[0], listing, sheet)
    usual = [ask(row) for row in _spread(label)]
    apart, said = [], ""
    if len(shown) > 1:
        # DisCo against its teacher; without a teacher the second run against the first.
        other = next((i for i, n in enumerate(shown) if i and n.role == DISTILLED), 1)
        shared = (near[0][:, :, None] == near[other][:, None, :]).sum((1, 2))
        apart = [ask(row) for row in _worst(shared, label)]
        said = (
            f" {shown[other].name} and {shown[0].name} share "
            f"{float(shared.double().mean()):.1f} of an image's {near[0].shape[1]} nearest on average."
        )
    gap, no_gap = _gap(shown, found, listing)
    text = (
        f"Nearest among {len(label)} validation images of {listing.source.name}, by cosine.{said}"
    )
    return Strips(text, usual, apart, gap, no_gap)


def _others(x: Tensor, k: int) -> Tensor:
    """[N,k] the nearest other rows, nearest first."""
    unit, index = F.normalize(x, dim=1), torch.arange(len(x))
    near = nearest(unit, index, unit, k + 1)[1]
    own = near == index[:, None]
    # Of exact copies another may stand before the row itself; then the last one goes.
    own[~own.any(1), -1] = True
    return near[~own].view(len(x), k)


def _spread(label: Tensor) -> list[int]:
    """The first row of some classes, evenly spread."""
    classes = label.unique().tolist()
    if len(classes) == 1:
        return list(range(0, len(label), max(1, len(label) // QUERIES)))[:QUERIES]
    some = classes[:: max(1, len(classes) // QUERIES)][:QUERIES]
    return [int((label == c).nonzero()[0]) for c in some]


def _worst(shared: Tensor, label: Tensor) -> list[int]:
    """The rows that share least; of equal ones those of classes that are not there yet."""
    found: list[int] = []
    for least in shared.unique().tolist():
        rows = (shared == least).nonzero().flatten().tolist()
        seen = {int(label[r]) for r in found}
        first = {int(label[r]): r for r in reversed(rows) if int(label[r]) not in seen}
        firsts = sorted(first.values())
        found += [*firsts, *(r for r in rows if r not in firsts)][: QUERIES - len(found)]
        if len(found) == QUERIES:
            break
    return found


def _query(
    row: int,
    shown: Sequence[Network],
    near: Sequence[Tensor],
    images: Features,
    listing: Listing,
    sheet: Sheet,
) -> Query:
    label, index = images.label.tolist(), images.index.tolist()
    tile = lambda r: sheet.add(listing, index[r])
    rows = []
    for i, (network, found) in enumerate(zip(shown, near)):
        mine = found[row].tolist()
        shared = len({*mine} & {*near[0][row].tolist()}) if i else None
        same = [label[r] == label[row] for r in mine]
        names = [listing.files[index[r]] for r in mine]
        rows.append(Row(network.name, names, [tile(r) for r in mine], same, shared))
    return Query(listing.files[index[row]], tile(row), listing.classes[label[row]], rows)


def _gap(
    shown: Sequence[Network], found: Sequence[Features], listing: Listing
) -> tuple[Gap | None, str]:
    label = found[0].label
    if shown[0].role != TEACHER:
        return None, "There is no teacher here to be behind of."
    if len(shown) < 2:
        return None, "There is no student here beside the teacher."
    classes = label.unique().tolist()
    if len(classes) < 2:
        return None, "The images have no classes, so no class is behind."
    evaluated = _evaluated(shown)
    if evaluated:
        label, votes = evaluated
        classes = label.unique().tolist()
        text = f"By fastdisco eval knn, of all {len(label)} validation images, in percent."
        if len(classes) > CLASSES:
            text += f" {CLASSES} of {len(classes)} classes are shown."
    else:
        k = min(VOTES, len(label) - 1)
        votes = [health.among_others(f, len(listing.classes), k, TEMP) for f in found]
        least = min(int((label == c).sum()) for c in classes)
        text = (
            f"By the {VOTES} nearest of these images, in percent: one image of a class is up to "
            f"{100 / least:.1f}. After fastdisco eval knn of each network this table is of all "
            "validation images."
        )
    rows = []
    for c in classes:
        own = label == c
        rows.append((listing.classes[c], [float((v == label)[own].double().mean()) for v in votes]))
    target = next((i for i, n in enumerate(shown) if n.role == DISTILLED), 1)
    rows.sort(key=lambda r: r[1][target] - r[1][0])
    return Gap([n.name for n in shown], rows[:CLASSES], text), ""


def _evaluated(shown: Sequence[Network]) -> tuple[Tensor, list[Tensor]] | None:
    """(labels, each network's votes), [N] each, of `fastdisco eval knn`; None unless every network was
    evaluated by one protocol, on all validation images."""
    first, votes = None, []
    for network in shown:
        of_knn = (r for r in network.measured.results if r.what == "knn" and r.labels is not None)
        result = next((r for r in of_knn if "knn_top1" in r.predictions), None)
        if result is None or result.labels is None:
            return None
        first = first or result
        if comparable(result.protocol) != comparable(first.protocol):
            return None
        votes.append(torch.from_numpy(result.predictions["knn_top1"]))
    assert first is not None and first.labels is not None
    return torch.from_numpy(first.labels), votes
