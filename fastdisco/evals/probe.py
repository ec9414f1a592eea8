"""Whether a teacher has learned anything: kNN of its features and of its embedding, beside what an
untrained network and raw pixels reach."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco.evals import knn
from fastdisco.models import Net

# Side to which an image is reduced for the comparison with raw pixels.
PIXELS = 16

# What the shares below must pass: all that needs no training, and chance.
FLOORS = {"features": ("untrained", "pixels", "chance"), "embedding": ("chance",)}


class Encoded(NamedTuple):
    """A batch whose one view is already what kNN compares."""

    views: list[Tensor]
    label: Tensor


@torch.no_grad()
def run(
    net: Net,
    untrained: Net,
    bank: Iterable[knn.Labelled],
    queries: Iterable[knn.Labelled],
    classes: int,
    k: int = 20,
    temp: float = 0.07,
) -> dict[str, float]:
    """Shares of queries, 0..1, whose class the k nearest bank images tell, as in `knn.run`; every
    image is decoded once.

    net, untrained  in eval mode; untrained is the same architecture with random weights
    Returns features and embedding (of net), untrained, pixels and chance."""
    # From images x and the net's features f.
    encoders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "features": lambda x, f: f,
        "embedding": lambda x, f: net.head(f),
        "untrained": lambda x, f: untrained.features(x),
        "pixels": lambda x, f: F.adaptive_avg_pool2d(x, PIXELS).flatten(1),
    }

    def encoded(batches: Iterable[knn.Labelled]) -> dict[str, list[Encoded]]:
        out = {name: [] for name in encoders}
        for batch in batches:
            x = batch.views[0]
            f = net.features(x)
            for name, encode in encoders.items():
                out[name].append(Encoded([encode(x, f).float()], batch.label))
        return out

    known, asked = encoded(bank), encoded(queries)
    found = {}
    for name in encoders:
        scores = knn.run(lambda x: x, known[name], asked[name], classes, k, temp)
        found[name] = scores["knn_top1"]
    return found | {"chance": 1 / classes}


def verdict(found: dict[str, float], queries: int) -> str | None:
    """What speaks against a teacher with these shares; None: nothing does.

    found: what `run` returned, of so many queries.  Each share must pass its FLOORS by
    1/sqrt(queries), which is two standard errors of a share at most."""
    least = queries**-0.5
    for name, floors in FLOORS.items():
        floor = max(floors, key=lambda f: found[f])
        if not found[name] > found[floor] + least:
            return (
                f"its {name} tell the class of {found[name]:.1%} of {queries} images, {floor} "
                f"{found[floor]:.1%}, to be passed by {least:.1%}"
            )
    return None
