"""One pass of the frozen networks over a part of a data set, each rank its share."""

from collections.abc import Callable, Sequence
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


def refuse_equal(train: data.Listing, val: data.Listing) -> None:
    """Raises UserError where val holds the training images: as many, of which some, spread evenly,
    are the same bytes."""
    if len(train.files) != len(val.files):
        return
    some = np.linspace(0, len(val.files) - 1, min(16, len(val.files))).astype(int).tolist()
    if all(_bytes(train, i) == _bytes(val, i) for i in some):
        raise UserError(
            f"{val.source}: holds the images of {train.source}, so an accuracy would be that of "
            "images seen in training; give other validation images"
        )


def refuse_same_images(train: Sequence[int], val: Sequence[int]) -> None:
    """The same of two parts of one listing."""
    if both := len(set(train) & set(val)):
        raise UserError(f"{both} images are in training and validation; give two that are apart")


def _bytes(listing: data.Listing, index: int) -> bytes:
    try:
        return listing.read(index)
    except OSError as e:
        raise UserError(
            f"{listing.root / listing.files[index]}: cannot be read ({e}); restore it, or leave it "
            "out by fastdisco data check"
        ) from None
