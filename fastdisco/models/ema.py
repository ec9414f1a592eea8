"""The mean student (EMA), MoCo's momentum encoder: arXiv:1911.05722, equation 2."""

import copy

import torch
from timm.layers import DropPath
from torch import nn

from fastdisco.models.net import Net


def ema_copy(net: Net) -> Net:
    """The mean student at its start: a copy without gradients, in train mode, for its batch-norm
    statistics are its own, but with every path (stochastic depth perturbs the student alone, as in
    DINO)."""
    ema = copy.deepcopy(net).requires_grad_(False).train()
    for m in ema.modules():
        if isinstance(m, DropPath):
            m.drop_prob = 0.0
    return ema


@torch.no_grad()
def ema_update(ema: nn.Module, net: nn.Module, m: float):
    """ema = m ema + (1 - m) net over the parameters alone; float32 or wider, since 1 - m drowns in
    half precision.  MoCo, equation 2."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - m)
