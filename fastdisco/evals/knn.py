"""Weighted k-nearest-neighbour accuracy of frozen features, as in instance discrimination,
arXiv:1805.01978, section 3.4."""

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco import config, data
from fastdisco.common import dist
from fastdisco.config import Crop

# Similarities that are held at a time: 256 MB in float32.
_SIMILARITIES = 2**26


class Labelled(Protocol):
    """What is read of a batch."""

    @property
    def views(self) -> list[Tensor]: ...

    @property
    def label(self) -> Tensor: ...


@torch.no_grad()
def run(
    encode: Callable[[Tensor], Tensor],
    bank: Iterable[Labelled],
    queries: Iterable[Labelled],
    classes: int,
    k: int = 20,
    temp: float = 0.07,
) -> dict[str, float]:
    """Share of query images whose class gets the most votes among the k nearest bank images, of
    which each votes exp(cos / temp).

    encode         [B,3,S,S] -> [B,F] features of any float type, normalised here in float32
    bank, queries  batches of this rank's own part of the images, of any size; the parts together
                   are the whole
    Every rank searches its part of the bank for all queries, and the candidates are merged: no rank
    ever holds the whole bank.  Returns {"knn_top1": 0..1}, equal on all ranks and for any number of
    ranks."""
    bank_x, bank_y = _features(encode, bank)
    query_x, query_y = (_gather_ragged(t) for t in _features(encode, queries))
    total = int(dist.all_sum(torch.tensor(len(bank_x), device=bank_x.device)))
    k = min(k, total)
    correct = torch.zeros((), dtype=torch.int64, device=bank_x.device)
    # The same on all ranks, for every rank takes part in every merge.
    rows = dist.all_min(max(1, _SIMILARITIES // max(1, len(bank_x))))
    for x, y in zip(query_x.split(rows), query_y.split(rows)):
        sim, at = (x @ bank_x.T).topk(min(k, len(bank_x)), dim=1)
        sim, label = _merge(sim, bank_y[at], k)
        votes = x.new_zeros(len(x), classes).scatter_add_(1, label, (sim / temp).exp())
        correct += (votes.argmax(1) == y).sum()
    return {"knn_top1": correct.item() / len(query_y)}


def score(
    encode: Callable[[Tensor], Tensor],
    train: data.Listing,
    val: data.Listing,
    images: config.Data,
    view: Crop,
    cfg: config.Eval,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """`run` with training images as the bank and the validation images as queries, each rank its
    part.

    train  cfg.bank of its images, drawn by `seed`, are the bank; with None all
    images, view  the evaluation pipeline: the short side is resized to images.eval_resize, the
                  centre is cropped, and normalised as `view` says"""
    data.same_classes(train, val)
    kept = train.kept
    if cfg.bank and cfg.bank < len(kept):
        kept = np.sort(np.random.default_rng(seed).permutation(kept)[: cfg.bank])

    def loader(listing: data.Listing, indices: np.ndarray) -> data.EvalLoader:
        return data.EvalLoader(
            listing,
            images.eval_resize,
            images.eval_size,
            images.eval_batch,
            images.threads,
            device,
            indices=_mine(data.reading_order(listing, indices), images.eval_batch),
            mean=view.mean,
            std=view.std,
            placement=data.place(images, device),
        )

    bank, queries = loader(train, kept), loader(val, val.kept)
    return run(encode, bank, queries, len(train.classes), cfg.k, cfg.temp)


def _mine(indices: np.ndarray, batch: int) -> np.ndarray:
    """This rank's part in whole batches, dealt in turn.

    So a batch holds the same images on any number of ranks, and rounds the same."""
    # Of a few images every rank still gets some.
    batch = min(batch, len(indices) // dist.world())
    starts = range(dist.rank() * batch, len(indices), dist.world() * batch)
    # An empty part first: a rank may get no batch at all.
    return np.concatenate([indices[:0], *(indices[i : i + batch] for i in starts)])


def _features(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Labelled]
) -> tuple[Tensor, Tensor]:
    """Unit rows [N,F] float32 and labels [N]."""
    xs, ys = [], []
    for batch in batches:
        xs.append(F.normalize(encode(batch.views[0]).float(), dim=1))
        ys.append(batch.label)
    return torch.cat(xs), torch.cat(ys).to(xs[0].device)


def _merge(sim: Tensor, label: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best [B,k] among the candidates of all ranks.

    A rank with fewer than k of its own fills up with -inf, whose vote is 0."""
    if dist.world() == 1:
        return sim, label
    pad = k - sim.shape[1]
    sim = F.pad(sim, (0, pad), value=-torch.inf)
    label = F.pad(label, (0, pad))
    sims = dist.all_gather(sim[None]).transpose(0, 1).flatten(1)  # [B,ranks*k]
    labels = dist.all_gather(label[None]).transpose(0, 1).flatten(1)
    best, at = sims.topk(k, dim=1)
    return best, labels.gather(1, at)


def _gather_ragged(x: Tensor) -> Tensor:
    """[n,...], with an n of each rank's own, -> the rows of all ranks in their order."""
    if dist.world() == 1:
        return x
    counts = dist.all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    # A gather takes as many rows from each rank: the longest part's.
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = dist.all_gather(padded).split(max(counts))
    return torch.cat([p[:n] for p, n in zip(parts, counts)])
