"""Weighted k-nearest-neighbour accuracy for several k and temperatures from one search, as in
instance discrimination, arXiv:1805.01978, section 3.4.

Letters: Q queries, N bank images of all ranks, F features, C classes."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.evals.features import Features, count, gathered
from fastdisco.evals.settings import KS, TEMPS

# Similarities in memory at a time are QUERIES x BANK: 64 MiB.
QUERIES, BANK = 1024, 16384
# Candidates beyond k, so that equal similarities at the end are cut by index and not by chance.
SPARE = 8


def run(
    bank: Features,
    queries: Features,
    classes: int,
    ks: Sequence[int] = KS,
    temps: Sequence[float] = TEMPS,
) -> dict[str, float]:
    """Share of queries, 0..1, whose class gets the most votes among the k nearest bank images:
    each votes exp(cos / temp).

    bank, queries  this rank's own parts
    Returns {"knn_top1_k20_t0.07": ...} for every k and temperature, equal on all ranks and for
    any number of ranks."""
    label = gathered(queries).label
    found = predict(bank, queries, classes, ks, temps)
    return {name: (p == label).double().mean().item() for name, p in found.items()}


@torch.no_grad()
def predict(
    bank: Features,
    queries: Features,
    classes: int,
    ks: Sequence[int] = KS,
    temps: Sequence[float] = TEMPS,
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """The classes that are voted for, [Q] int64 on every rank, by the names of `run`; queries in
    the order of their indices.

    watch  is called after each piece, on all ranks alike, and may raise to stop
    Raises UserError where a k is larger than the bank."""
    total = count(bank.x)
    if max(ks) > total:
        raise UserError(
            f"knn: {max(ks)} neighbours of {total} bank images; give a smaller k or a larger bank"
        )
    parts: dict[str, list[Tensor]] = {name(k, t): [] for k in ks for t in temps}
    for x in F.normalize(gathered(queries).x, dim=1).split(QUERIES):
        sim, _, label = _of_all_ranks(*nearest(bank.x, bank.index, x, max(ks)), bank, max(ks))
        for key, classes_of in _votes(sim, label, classes, ks, temps).items():
            parts[key].append(classes_of)
        watch()
    return {key: torch.cat(p) for key, p in parts.items()}


def name(k: int, temp: float) -> str:
    return f"knn_top1_k{k}_t{temp:g}"


def nearest(
    bank: Tensor, index: Tensor, queries: Tensor, k: int, rows: int = BANK
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, image indices and bank rows [Q,k'] of the k' = min(k, N) nearest, nearest first.

    bank     [N,F], normalised here piece by piece: a copy of it would double the memory
    queries  unit rows [Q,F]
    index    [N], which decides between equal cosines
    rows     of the bank at a time"""
    k = min(k, len(bank))
    none = queries.new_zeros(len(queries), 0)
    best, ids, at = none, none.long(), none.long()
    for start in range(0, len(bank), rows):
        sim = queries @ F.normalize(bank[start : start + rows], dim=1).T
        sim, here = sim.topk(min(k + SPARE, sim.shape[1]), dim=1)
        here = here + start
        best, ids, at = _first(
            torch.cat([best, rounded(sim)], 1),
            torch.cat([ids, index[here]], 1),
            torch.cat([at, here], 1),
            k,
        )
    return best, ids, at


def rounded(sim: Tensor) -> Tensor:
    """Cosines to 20 bits after the point, so that copies of an image are equally near although
    their products, in another place of a matrix, round otherwise."""
    return (sim * 2**20).round() / 2**20


def _first(sim: Tensor, index: Tensor, rest: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest, of equal ones those with the smallest index."""
    order = index.argsort(stable=True, dim=1)
    order = order.gather(1, sim.gather(1, order).argsort(stable=True, dim=1, descending=True))
    order = order[:, :k]
    return sim.gather(1, order), index.gather(1, order), rest.gather(1, order)


def _of_all_ranks(
    sim: Tensor, index: Tensor, at: Tensor, bank: Features, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of all ranks' candidates: cosines, indices, labels [Q,k].  A rank with fewer than k
    of its own fills up with -inf."""
    label = bank.label[at]
    if dist.world() == 1:
        return sim, index, label
    pad = (0, k - sim.shape[1])
    own = F.pad(sim, pad, value=-torch.inf), F.pad(index, pad), F.pad(label, pad)
    sims, indices, labels = (dist.all_gather(t[None]).transpose(0, 1).flatten(1) for t in own)
    return _first(sims, indices, labels, k)


def _votes(
    sim: Tensor, label: Tensor, classes: int, ks: Sequence[int], temps: Sequence[float]
) -> dict[str, Tensor]:
    """{name: [Q]}; the votes for k are those for the next smaller one and some more."""
    out = {}
    for temp in temps:
        # Less the largest exponent there can be: at a small temperature exp overflows.
        weight = ((sim.double() - 1) / temp).exp()
        votes, done = weight.new_zeros(len(sim), classes), 0
        for k in sorted(ks):
            votes.scatter_add_(1, label[:, done:k], weight[:, done:k])
            out[name(k, temp)], done = votes.argmax(1), k
    return out
