"""Weights whose rows have length 1 at every moment, as SwAV's prototypes (arXiv:2006.09882).

SwAV's code scales them before each forward.  Here they are scaled after each optimizer step, in
what the optimizer holds: so forward, evaluation and checkpoint find them with length 1, nothing is
edited between a forward and its backward, and it works where ZeRO has cut them.

A module names such parameters, of two dimensions, in its attribute `unit_rows`."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdisco.common import dist

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def keep(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Scales them after each step of an optimizer that holds the network's own parameters."""
    weights = list(_named(net).values())

    @torch.no_grad()
    def scale(*_: Any) -> None:
        for weight in weights:
            # Without a gradient it has not moved, and is left as it is to the last bit.
            if weight.grad is not None:
                weight.div_(_length(weight.square().sum(1, keepdim=True)))

    if weights:
        optimizer.register_step_post_hook(scale)


def keep_flat(engine: "DeepSpeedEngine") -> None:
    """The same from ZeRO stage 1 on, where the optimizer holds flat pieces of many tensors."""
    # This module is below zero.py's importer.
    from fastdisco.engine.zero import flat_groups

    weights = _named(engine.module)

    @torch.no_grad()
    def scale(*_: Any) -> None:
        for flat, pieces in flat_groups(engine):
            for piece in pieces:
                if piece.name in weights:
                    mine = flat[piece.at : piece.at + piece.n]
                    _scale_piece(mine, piece.first, piece.shape)

    if weights:
        engine.basic_optimizer.register_step_post_hook(scale)


def _named(net: nn.Module) -> dict[str, nn.Parameter]:
    """By name, as in named_parameters."""
    found = {}
    for prefix, module in net.named_modules():
        for name in getattr(module, "unit_rows", ()):
            found[f"{prefix}.{name}" if prefix else name] = module.get_parameter(name)
    return found


def _scale_piece(mine: Tensor, first: int, shape: torch.Size) -> None:
    """mine: elements first, first+1 ... of the weight, flat.  Every rank must call it."""
    rows = torch.arange(first, first + len(mine), device=mine.device) // shape[1]
    squares = mine.new_zeros(shape[0]).index_add_(0, rows, mine.square())
    # A row may lie on two ranks.
    mine.div_(_length(dist.all_sum(squares))[rows])


def _length(squares: Tensor) -> Tensor:
    return squares.sqrt().clamp(min=1e-12)
