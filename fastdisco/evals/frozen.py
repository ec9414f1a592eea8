"""The frozen backbone as evaluations run it: without gradient, in the configuration's precision, and
on a GPU as a CUDA graph."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco.common.precision import autocast
from fastdisco.engine.cudagraph import Capture, Graphed


class _Out(NamedTuple):
    x: Tensor


def encoder(
    encode: Callable[[Tensor], Tensor],
    precision: str,
    device: torch.device,
    graphs: bool = True,
    capture: Callable[..., Any] = Capture,
) -> Callable[[Tensor], Tensor]:
    """[B,3,S,S] -> [B,F] float32.

    encode  of an image in eval mode, so that no row depends on another
    graphs  whether there may be a graph; on a CPU there is none
    capture makes it
    A batch that is smaller than the first one is filled up, and what fills it is cut off again: the
    last batch of a pass needs no graph of its own."""
    graph = graphs and (device.type == "cuda" or capture is not Capture)
    # A graph casts the weights anew in each replay.
    half = autocast(precision, device, cache=not graph)(encode)

    @torch.no_grad()
    def forward(views: list[Tensor]) -> _Out:
        return _Out(half(views[0]).float())

    if not graph:
        return lambda x: forward([x]).x
    graphed = Graphed("evaluation", forward, capture=capture)
    rows = 0

    def run(x: Tensor) -> Tensor:
        nonlocal rows
        rows = rows or len(x)
        missing = max(0, rows - len(x))
        filled = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else x
        return graphed([filled]).x[: len(x)]

    return run
