"""Whether a teacher has learned anything: kNN of its features and of its embedding beside what an
untrained network and raw pixels reach."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco.evals import knn
from fastdisco.models import Net

PIXELS = 16  # side to which an image is reduced for the comparison with raw pixels


class Cached(NamedTuple):
    views: list[Tensor]
    label: Tensor


@torch.no_grad()
def run(
    net: Net,
    untrained: Net,
    bank: Iterable,
    queries: Iterable,
    classes: int,
    k: int = 20,
    temp: float = 0.07,
) -> dict[str, float]:
    """Shares of queries, 0..1, whose class the k nearest bank images tell, as in `knn.run`; every
    image is decoded once.

    net, untrained  in eval mode; untrained is the same architecture with random weights
    Returns features and embedding (of net), untrained, pixels and chance."""
    encode = {
        "features": lambda x, f: f,
        "embedding": lambda x, f: net.head(f),
        "untrained": lambda x, f: untrained.features(x),
        "pixels": lambda x, f: F.adaptive_avg_pool2d(x, PIXELS).flatten(1),
    }
    sides = []
    for batches in (bank, queries):
        side = {name: [] for name in encode}
        for batch in batches:
            x = batch.views[0]
            f = net.features(x)
            for name, of in encode.items():
                side[name].append(Cached([of(x, f).float()], batch.label))
        sides.append(side)
    found = {
        name: knn.run(lambda x: x, sides[0][name], sides[1][name], classes, k, temp)["knn_top1"]
        for name in encode
    }
    return found | {"chance": 1 / classes}


def verdict(found: dict[str, float], queries: int) -> str | None:
    """What speaks against a teacher with these shares; None: nothing does.

    The features must pass all that needs no training, the embedding chance, by 1/sqrt(queries): two
    standard errors of a share, at most."""
    least = queries**-0.5
    for name, floors in (
        ("features", ("untrained", "pixels", "chance")),
        ("embedding", ("chance",)),
    ):
        floor = max(floors, key=found.get)
        if not found[name] > found[floor] + least:
            return f"its {name} tell the class of {found[name]:.1%} of {queries} images, {floor} {found[floor]:.1%}, to be passed by {least:.1%}"
    return None
