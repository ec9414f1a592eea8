"""Retrieval: each image asks for the others of its class, ranked by cosine.

Letters: N images, F features."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.evals.features import Features, gathered
from fastdisco.evals.neighbours import rounded
from fastdisco.evals.settings import RECALLS

# Cosines in memory at a time.
CELLS = 2**24


@torch.no_grad()
def run(
    own: Features, ks: Sequence[int] = RECALLS, watch: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Recall at k (share of queries with an image of their class among the k nearest) and the mean
    average precision over the whole ranking, 0..1; a query is not among its own answers.

    own    this rank's part; every image is a query and an answer
    watch  is called after each piece of this rank's queries, and may raise to stop
    Queries whose class has no other image are left out: `retrieve_queries` says how many asked.
    Equal on all ranks and for any number of ranks.  Raises UserError where none is left."""
    whole = gathered(own)
    x, y = F.normalize(whole.x, dim=1), whole.label
    mine = torch.arange(dist.rank(), len(x), dist.world(), device=x.device)
    sums = x.new_zeros(len(ks) + 2, dtype=torch.float64)
    for rows in mine.split(max(1, CELLS // len(x))):
        sums += _sums(x, y, rows, ks)
        watch()
    *recalls, precision, queries = dist.all_sum(sums).tolist()
    if not queries:
        raise UserError(
            f"retrieve: no class has two of the {len(x)} images; give a data set with more"
        )
    found = {f"recall_at_{k}": r / queries for k, r in zip(ks, recalls)}
    return found | {"map": precision / queries, "retrieve_queries": queries}


def _sums(x: Tensor, y: Tensor, rows: Tensor, ks: Sequence[int]) -> Tensor:
    """Of these queries: how many found at each k, sum of average precisions, number."""
    right = (y[_ranking(x[rows] @ x.T, rows)] == y[rows, None]).double()
    there = right.sum(1)
    asked = there > 0
    place = torch.arange(1, right.shape[1] + 1, device=x.device)
    precision = (right * right.cumsum(1) / place).sum(1) / there.clamp(min=1)
    hits = [(right[:, :k].sum(1) > 0)[asked].sum() for k in ks]
    return torch.stack([*hits, precision[asked].sum(), asked.sum()]).double()


def _ranking(sim: Tensor, rows: Tensor) -> Tensor:
    """[n,N] cosines of the queries in these rows -> [n,N-1] rows of the others, nearest first; of
    equal cosines the smaller row comes first.

    Cosine and row are made one integer.  No two are equal, so nothing but the integers is sorted,
    which on a CPU takes NumPy a ninth of the time of torch's stable argsort."""
    bits = 32
    place = torch.arange(sim.shape[1], device=sim.device)
    key = place - ((rounded(sim) * 2**20).long() << bits)
    key.scatter_(1, rows[:, None], torch.iinfo(torch.int64).max)
    on_cpu = key.device.type == "cpu"
    best = torch.from_numpy(np.sort(key.numpy(), axis=1)) if on_cpu else key.sort(dim=1).values
    return best[:, :-1] & (2**bits - 1)
