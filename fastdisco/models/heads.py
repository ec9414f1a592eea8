"""Projection heads, from a backbone's features to the embedding, and prototypes, from the embedding
to scores.

The keys of their state dicts are those of the published checkpoints.
Shapes: F features, d embedding, P prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(dim: int, hidden: int, out: int, bn: bool = False) -> nn.Sequential | nn.Linear:
    """Linear-ReLU-Linear, the head of MoCo-v2 (arXiv:2003.04297): [...,dim] -> [...,out].

    hidden  width of the hidden layer; 0: a single Linear, as in MoCo-v1
    bn      Linear-BN-ReLU-Linear, the head of SwAV (arXiv:2006.09882)"""
    if not hidden:
        return nn.Linear(dim, out)
    norm = [nn.BatchNorm1d(hidden)] if bn else []
    return nn.Sequential(
        nn.Linear(dim, hidden), *norm, nn.ReLU(inplace=True), nn.Linear(hidden, out)
    )


def dino_mlp(
    dim: int, hidden: int = 2048, bottleneck: int = 256, bn: bool = False
) -> nn.Sequential | nn.Linear:
    """Linear-GELU-Linear-GELU-Linear: [...,dim] -> [...,bottleneck].  It is DINO's head up to its
    normalisation (arXiv:2104.14294, section 3.1).

    hidden  width of the two hidden layers; 0: a single Linear
    bn      a batch norm before each GELU
    Weights are drawn by DINO's rule: from a normal distribution of deviation 0.02, cut at +-2, and
    biases are 0."""
    layers: list[nn.Module] = []
    width = dim
    for _ in range(2 if hidden else 0):
        layers += [nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] if bn else []), nn.GELU()]
        width = hidden
    last = nn.Linear(width, bottleneck)
    # Only now that all are made: the order of random draws is part of what a seed means.
    for m in (*layers, last):
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
    return nn.Sequential(*layers, last) if hidden else last


class Prototypes(nn.Module):
    """Cosines of embeddings to prototypes, [...,d] -> [...,P]: SwAV's prototypes, or DINO's
    weight-normalised last layer.

    SwAV's code puts its prototypes back to length 1 in place, before each forward.  Here the
    forward normalises them: nothing edits what the optimizer holds, and the gradient is along the
    sphere."""

    def __init__(self, dim: int, count: int, gain: bool = False) -> None:
        """gain  each prototype has a trained length, which starts at 1 (DINO's norm_last_layer
        False); otherwise lengths are fixed at 1."""
        super().__init__()
        # Drawn by torch's initialisation of a linear layer, as in both papers' code.
        self.weight = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())
        self.gain = nn.Parameter(torch.ones(count)) if gain else None

    def forward(self, z: Tensor) -> Tensor:
        """z need not be normalised.  Lengths are computed in float32 or wider, the product in the
        precision of an active autocast."""
        wide = torch.promote_types(z.dtype, torch.float32)
        scores = F.linear(F.normalize(z.to(wide), dim=-1), F.normalize(self.weight, dim=1))
        return scores if self.gain is None else scores * self.gain
