"""The mean student (EMA): MoCo's momentum encoder, arXiv:1911.05722, equation 2."""

import copy
from collections.abc import Iterator

import torch
from timm.layers import DropBlock2d, DropPath, PatchDropout
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastdisco.models.net import Net


def ema_copy(net: Net) -> Net:
    """The mean student at its start: a copy that gets no gradients.

    It stays in training mode, since its batch-norm statistics are its own.  Stochastic depth and
    dropout are switched off in it: as in DINO, only the student is perturbed."""
    ema = copy.deepcopy(net).requires_grad_(False).train()
    for m, name in _chances(ema):
        setattr(m, name, 0.0)
    return ema


def perturbed(net: Net) -> bool:
    """Whether stochastic depth or dropout is on in it, in training."""
    return any(getattr(m, name) for m, name in _chances(net))


@torch.no_grad()
def ema_update(ema: nn.Module, net: nn.Module, m: float) -> None:
    """ema = m ema + (1 - m) net, over the parameters alone and not the buffers.  MoCo, equation 2.

    Parameters are float32 or wider: in half precision 1 - m would be lost in rounding."""
    moved: list[Tensor] = list(ema.parameters())
    targets: list[Tensor] = list(net.parameters())
    torch._foreach_lerp_(moved, targets, 1 - m)


def _chances(net: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Each module that drops something, and the name of its chance."""
    for m in net.modules():
        if isinstance(m, DropPath | DropBlock2d):
            yield m, "drop_prob"
        elif isinstance(m, PatchDropout):
            yield m, "prob"
        elif isinstance(m, _DropoutNd):
            yield m, "p"
        # timm's convolutional networks drop features by a function, at this rate.
        if isinstance(getattr(m, "drop_rate", None), float | int):
            yield m, "drop_rate"
