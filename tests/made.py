"""Features with a known structure, for the tests of the evaluations."""

import numpy as np
import torch

from fastdisco.common import dist
from fastdisco.evals.features import Features


def made(n, classes, seed, width=16, apart=0.5, dtype=torch.float32):
    """Class centres, the same for every seed, plus noise; indices in order."""
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    x = rng.normal(size=(n, width)) + apart * _centres(classes, width)[y]
    return Features(torch.tensor(x, dtype=dtype), torch.tensor(y), torch.arange(n))


def _centres(classes, width):
    return np.random.default_rng(0).normal(size=(classes, width))


def part(f, mix=True):
    """This rank's share of the features: every n-th row, in an order that is no listing's."""
    rows = torch.arange(dist.rank(), len(f.x), dist.world())
    return f.take(rows.flip(0) if mix else rows)


def join():
    """Makes this process one of the ranks that its variables name."""
    dist.defaults()
    torch.distributed.init_process_group("gloo")
    assert torch.distributed.get_world_size() == dist.world()
