"""Heads: from a backbone's features to the embedding, and from there to scores of prototypes.  Keys
of their state dicts are those of the published checkpoints."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(dim: int, hidden: int, out: int, bn: bool = False) -> nn.Sequential | nn.Linear:
    """Linear-ReLU-Linear, the head of MoCo-v2 (arXiv:2003.04297); with bn Linear-BN-ReLU-Linear,
    SwAV's (arXiv:2006.09882).

    hidden 0: MoCo-v1's single Linear."""
    if not hidden:
        return nn.Linear(dim, out)
    norm = [nn.BatchNorm1d(hidden)] if bn else []
    return nn.Sequential(
        nn.Linear(dim, hidden), *norm, nn.ReLU(inplace=True), nn.Linear(hidden, out)
    )


def dino_mlp(
    dim: int, hidden: int = 2048, bottleneck: int = 256, bn: bool = False
) -> nn.Sequential | nn.Linear:
    """Linear-GELU-Linear-GELU-Linear to the bottleneck, DINO's head (arXiv:2104.14294, section 3.1)
    up to its normalisation; with bn a batch norm before each GELU.  Weights by DINO's rule: normal
    of deviation 0.02, cut at 2 absolute, biases 0.  hidden 0: a single Linear."""
    act = lambda: [*([nn.BatchNorm1d(hidden)] if bn else []), nn.GELU()]
    layers = [nn.Linear(dim, hidden), *act(), nn.Linear(hidden, hidden), *act()] if hidden else []
    layers.append(nn.Linear(hidden or dim, bottleneck))
    for m in layers:
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
    return nn.Sequential(*layers) if hidden else layers[0]


class Prototypes(nn.Module):
    """Cosines of embeddings to prototypes: SwAV's prototypes, and DINO's weight-normalised last
    layer, whose length g is fixed at 1.

    SwAV's code puts its prototypes back to length 1 before each forward, in place; here the forward
    normalises them, so that nothing edits what the optimizer holds and the gradient is along the
    sphere."""

    def __init__(self, dim: int, count: int, gain: bool = False):
        """gain: each prototype has a length that is trained (DINO's norm_last_layer False), 1 at
        first."""
        super().__init__()
        # Torch's initialisation, as both papers' code.
        self.weight = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())
        self.gain = nn.Parameter(torch.ones(count)) if gain else None

    def forward(self, z: Tensor) -> Tensor:
        """[...,d] raw -> [...,P]; normalised in float32 at least, multiplied in the precision of an
        active autocast."""
        wide = torch.promote_types(z.dtype, torch.float32)
        scores = F.linear(F.normalize(z.to(wide), dim=-1), F.normalize(self.weight, dim=1))
        return scores if self.gain is None else scores * self.gain
