"""The layers of a network with what each computes and moves, found on the meta device: no weight is
made and nothing is computed."""

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from fastdisco.config import Crop


class Work(NamedTuple):
    """A layer's forward of one image, all crops together.

    flops     floating-point operations, two for a multiplication with its addition
    elements  numbers read and written, weights not counted
    weights   numbers trained in this layer
    norm      whether it is a batch norm"""

    flops: float
    elements: float
    weights: int
    norm: bool


def layers(net: nn.Module, crops: list[Crop]) -> list[Work]:
    """The layers in the order in which the forward of these crops calls them.

    net  on the meta device; its forward takes a list of crops [B,3,S,S]
    What no layer owns comes first, as one more: attention's products, position embeddings."""
    found: dict[nn.Module, list[float]] = {}
    flops = 0.0
    # Crops of one size cost the same.
    for size, many in Counter(c.size for c in crops).items():
        of_net, own = _forward(net, size)
        flops += many * of_net
        for m, numbers in own.items():
            kept = found.setdefault(m, [0.0, 0.0])
            kept[:] = [a + many * b for a, b in zip(kept, numbers)]
    known = [
        Work(*numbers, sum(p.numel() for p in m.parameters()), isinstance(m, _BatchNorm))
        for m, numbers in found.items()
    ]
    weights = sum(p.numel() for p in net.parameters())
    rest = Work(
        max(0.0, flops - sum(x.flops for x in known)),
        0.0,
        max(0, weights - sum(x.weights for x in known)),
        False,
    )
    return [rest, *known]


def _forward(net: nn.Module, size: int) -> tuple[float, dict[nn.Module, list[float]]]:
    """Operations of one crop's forward in all, and operations and elements of each layer, for one
    image.  Several are run: batch norms want more than one."""
    images, own = 2, {}

    def note(m: nn.Module, inputs: tuple, output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            numbers = own.setdefault(m, [0.0, 0.0])
            numbers[0] += _flops(m, inputs[0], output) / images
            numbers[1] += (inputs[0].numel() + output.numel()) / images

    hooks = [m.register_forward_hook(note) for m in net.modules() if not list(m.children())]
    count = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"), count:
        net([torch.zeros(images, 3, size, size)])
    for hook in hooks:
        hook.remove()
    return count.get_total_flops() / images, own


def _flops(m: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of convolutions and linear layers."""
    if isinstance(m, nn.Conv2d):
        # Its weight is [out, in/groups, h, w].
        return 2.0 * y.numel() * math.prod(m.weight.shape[1:])
    if isinstance(m, nn.Linear):
        return 2.0 * y.numel() * m.in_features
    return 0.0
