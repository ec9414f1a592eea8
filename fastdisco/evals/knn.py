"""Weighted k-nearest-neighbour accuracy of frozen features, as in instance discrimination,
arXiv:1805.01978, section 3.4."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco import config, data
from fastdisco.common import dist
from fastdisco.config import Crop


@torch.no_grad()
def run(
    encode: Callable[[Tensor], Tensor],
    bank: Iterable,
    queries: Iterable,
    classes: int,
    k: int = 20,
    temp: float = 0.07,
) -> dict[str, float]:
    """Share of query images whose class gets the most votes among the k nearest bank images: each
    votes exp(cos / temp).

    encode  [B,3,S,S] -> [B,F] features of any float type, normalised here in float32
    bank, queries  batches of this rank's own part of the images, any size; the parts together are
                   the whole
    Every rank searches its part of the bank for all queries and the candidates are merged, so a
    rank never holds the whole bank. Returns {"knn_top1": 0..1}, equal on all ranks and for any
    number of ranks."""
    bank_x, bank_y = _features(encode, bank)
    query_x, query_y = (_gather_ragged(t) for t in _features(encode, queries))
    total = int(dist.all_sum(torch.tensor(len(bank_x), device=bank_x.device)))
    k = min(k, total)
    correct = torch.zeros((), dtype=torch.int64, device=bank_x.device)
    rows = max(1, 2**26 // max(1, len(bank_x)))  # 256 MB of similarities at a time
    rows = dist.all_min(rows)  # every rank takes part in every merge
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
    """`run` with the training images (cfg.bank of them, drawn by `seed`) as bank and the validation
    images as queries, each rank its part.

    The images are seen through the evaluation pipeline: short side to images.eval_resize, centre
    crop, the normalisation of `view`."""
    data.same_classes(train, val)
    bank = train.kept
    if cfg.bank and cfg.bank < len(bank):
        bank = np.sort(np.random.default_rng(seed).permutation(bank)[: cfg.bank])
    loaders = [
        data.EvalLoader(
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
        for listing, indices in ((train, bank), (val, val.kept))
    ]
    return run(encode, *loaders, len(train.classes), cfg.k, cfg.temp)


def _mine(indices: np.ndarray, batch: int) -> np.ndarray:
    """This rank's part in whole batches, dealt in turn: a batch holds the same images on any number
    of ranks, and so rounds the same."""
    batch = min(batch, len(indices) // dist.world())  # of a few images every rank still gets some
    return np.concatenate(
        [
            indices[:0],
            *(
                indices[i : i + batch]
                for i in range(dist.rank() * batch, len(indices), dist.world() * batch)
            ),
        ]
    )


def _features(encode, batches) -> tuple[Tensor, Tensor]:
    """Unit rows [N,F] float32 and labels [N]."""
    xs, ys = [], []
    for batch in batches:
        xs.append(F.normalize(encode(batch.views[0]).float(), dim=1))
        ys.append(batch.label)
    return torch.cat(xs), torch.cat(ys).to(xs[0].device)


def _merge(sim: Tensor, label: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best [B,k] of all ranks' candidates; a rank with fewer than k of its own fills up with
    -inf, whose vote is 0."""
    if dist.world() == 1:
        return sim, label
    pad = k - sim.shape[1]
    sim = F.pad(sim, (0, pad), value=-torch.inf)
    label = F.pad(label, (0, pad))
    sims = dist.all_gather(sim[None]).transpose(0, 1).flatten(1)  # [B, ranks*k]
    labels = dist.all_gather(label[None]).transpose(0, 1).flatten(1)
    best, at = sims.topk(k, dim=1)
    return best, labels.gather(1, at)


def _gather_ragged(x: Tensor) -> Tensor:
    """[n,...] with an n of each rank's own -> all rows in rank order."""
    if dist.world() == 1:
        return x
    counts = dist.all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = dist.all_gather(padded).split(max(counts))
    return torch.cat([p[:n] for p, n in zip(parts, counts)])
