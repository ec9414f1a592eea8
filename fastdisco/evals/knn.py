"""kNN accuracy of frozen features during training: one k, one temperature.  The search and the vote
are those of neighbours.py."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastdisco import config, data
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.config import Crop
from fastdisco.evals import features, neighbours, passes
from fastdisco.evals.features import Features


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
    look: Callable[[Features], Any] | None = None,
) -> dict[str, float]:
    """Share of query images whose class gets the most votes among the k nearest bank images, of
    which each votes exp(cos / temp).

    encode         [B,3,S,S] -> [B,F] features of any float type, normalised here in float32
    bank, queries  batches of this rank's own part of the images, of any size; the parts together
                   are the whole
    look           is told this rank's features of the queries
    No rank ever holds the whole bank.  Returns {"knn_top1": 0..1}, equal on all ranks and for any
    number of ranks.
    Raises UserError, on every rank alike, where an image is damaged or a rank gets none."""
    # A damaged image is met by one rank alone, and the others would wait below.
    known, asked = dist.alike(lambda: (_features(encode, bank), _features(encode, queries)))
    if look:
        look(asked)
    k = min(k, features.count(known.x))
    (found,) = neighbours.predict(known, asked, classes, (k,), (temp,)).values()
    right = found == features.gathered(asked).label
    return {"knn_top1": right.double().mean().item()}


def score(
    encode: Callable[[Tensor], Tensor],
    train: data.Listing,
    val: data.Listing,
    images: config.Data,
    view: Crop,
    cfg: config.Eval,
    seed: int,
    device: torch.device,
    look: Callable[[Features], Any] | None = None,
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
            indices=passes.share(data.reading_order(listing, indices), images.eval_batch),
            mean=view.mean,
            std=view.std,
            placement=data.place(images, device),
        )

    bank, queries = loader(train, kept), loader(val, val.kept)
    return run(encode, bank, queries, len(train.classes), cfg.k, cfg.temp, look)


def _features(encode: Callable[[Tensor], Tensor], batches: Iterable[Labelled]) -> Features:
    xs, ys, indices = [], [], []
    for batch in batches:
        xs.append(encode(batch.views[0]).float())
        ys.append(batch.label)
        index = getattr(batch, "index", None)
        # A tuple's own `index` is a method.
        indices += [index] if isinstance(index, Tensor) else []
    if not xs:
        raise UserError(
            f"the images are fewer than {dist.world()} ranks; start fewer ranks, or give more images"
        )
    x = torch.cat(xs)
    y = torch.cat(ys).to(x.device)
    if len(indices) == len(ys):
        return Features(x, y, torch.cat(indices).to(x.device))
    # Batches that no loader made: their images are counted.
    return Features(x, y, torch.arange(len(y), device=x.device) * dist.world() + dist.rank())
