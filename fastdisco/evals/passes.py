"""One pass of the frozen networks over a part of a data set, each rank its share."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdisco import config, data
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.evals.features import Features, collect
from fastdisco.evals.protocols import Protocol


class View(NamedTuple):
    """How an image is seen without augmentation."""

    resize: int  # short side, pixels
    size: int  # of the centre crop
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def of_protocol(p: Protocol) -> View:
    return View(p.resize, p.size, p.val_interpolation, p.mean, p.std)


def of_config(cfg: config.Config) -> View:
    return View(cfg.data.eval_resize, cfg.data.eval_size, "linear", cfg.view.mean, cfg.view.std)


def features(
    encode: Callable[[Tensor], dict[str, Tensor]],
    listing: data.Listing,
    indices: np.ndarray,
    view: View,
    images: config.Data,
    device: torch.device,
    tick: Callable[[int], None] = lambda images: None,
) -> dict[str, Features]:
    """This rank's share of the features of these images; see `features.collect`.  Raises UserError
    where there are fewer images than ranks."""
    if len(indices) < dist.world():
        raise UserError(
            f"{listing.source}: {len(indices)} images are fewer than {dist.world()} ranks; start "
            "fewer ranks"
        )
    loader = data.EvalLoader(
        listing,
        view.resize,
        view.size,
        images.eval_batch,
        images.threads,
        device,
        indices=share(data.reading_order(listing, indices), images.eval_batch),
        mean=view.mean,
        std=view.std,
        placement=data.place(images, device),
        interpolation=view.interpolation,
    )
    return collect(encode, loader, tick)


def share(indices: np.ndarray, batch: int) -> np.ndarray:
    """This rank's part in whole batches, dealt in turn: a batch holds the same images on any number
    of ranks, and so rounds the same."""
    # Of a few images every rank still gets some.
    batch = max(1, min(batch, len(indices) // dist.world()))
    starts = range(dist.rank() * batch, len(indices), dist.world() * batch)
    return np.concatenate([indices[:0], *(indices[i : i + batch] for i in starts)])
