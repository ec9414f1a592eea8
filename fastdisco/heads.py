"""Projection heads, from a backbone's features to the embedding.  Keys of their state dicts are those of the published checkpoints."""
from torch import nn


def mlp(dim: int, hidden: int, out: int, bn: bool = False) -> nn.Sequential | nn.Linear:
    """Linear-ReLU-Linear, the head of MoCo-v2 (arXiv:2003.04297); with bn Linear-BN-ReLU-Linear, SwAV's (arXiv:2006.09882).

    hidden 0: MoCo-v1's single Linear."""
    if not hidden:
        return nn.Linear(dim, out)
    norm = [nn.BatchNorm1d(hidden)] if bn else []
    return nn.Sequential(nn.Linear(dim, hidden), *norm, nn.ReLU(inplace=True), nn.Linear(hidden, out))
