"""The projection heads that a teacher may have, told apart by where their layers lie."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from fastdisco.models import heads


class Head(NamedTuple):
    """A kind of head."""

    name: str
    # Places in the state dict of its layers with weights or buffers, () for a single one.
    places: tuple[int, ...]
    # From the widths of features, hidden layers and embedding.
    make: Callable[[int, int, int], nn.Module]
    # Whether a batch norm follows the last linear layer.
    bn_last: bool = False

    @property
    def last(self) -> str:
        """The name of the last linear layer's weight; its rows are the embedding's width."""
        at = -2 if self.bn_last else -1
        return f"head.{self.places[at]}.weight" if self.places else "head.weight"


def _moco_v3(layers: int) -> Callable[[int, int, int], nn.Module]:
    """MoCo v3's projector (arXiv:2104.02057): so many linear layers without bias, each with a batch
    norm, the last of which has no weights, and ReLUs between them."""

    def make(features: int, hidden: int, dim: int) -> nn.Module:
        parts: list[nn.Module] = []
        width = features
        for _ in range(layers - 1):
            linear = nn.Linear(width, hidden, bias=False)
            parts += [linear, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
            width = hidden
        last = nn.Linear(width, dim, bias=False)
        return nn.Sequential(*parts, last, nn.BatchNorm1d(dim, affine=False))

    return make


LINEAR = Head("one linear layer", (), lambda features, hidden, dim: heads.mlp(features, 0, dim))
MLP = Head("linear, ReLU, linear", (0, 2), heads.mlp)
MLP_BN = Head(
    "linear, batch norm, ReLU, linear",
    (0, 1, 3),
    lambda features, hidden, dim: heads.mlp(features, hidden, dim, bn=True),
)
DINO = Head("3 linear layers with GELU", (0, 2, 4), heads.dino_mlp)
DINO_BN = Head(
    "3 linear layers with batch norm and GELU",
    (0, 1, 3, 4, 6),
    lambda features, hidden, dim: heads.dino_mlp(features, hidden, dim, bn=True),
)
MOCO_V3 = Head("2 linear layers, each with batch norm, and ReLU", (0, 1, 3, 4), _moco_v3(2), True)
MOCO_V3_VIT = Head(
    "3 linear layers, each with batch norm, and ReLU", (0, 1, 3, 4, 6, 7), _moco_v3(3), True
)


def nearest(kinds: tuple[Head, ...], weights: Mapping[str, Any]) -> Head:
    """The head whose layers lie where the weights' do; else the nearest, so that loading them says
    what is wrong with it."""
    own = {int(m[1]) for k in weights if (m := re.match(r"head\.(\d+)\.", k))}
    return min(kinds, key=lambda head: len(own ^ set(head.places)))


def widths(head: nn.Module) -> str:
    """'2048 -> 2048 -> 128'"""
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    return " -> ".join(map(str, [linear[0].in_features, *(m.out_features for m in linear)]))
