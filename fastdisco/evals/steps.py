"""Where a linear evaluation's training steps come from: features computed once, or random crops of
images that the frozen backbone sees anew in every epoch."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastdisco import data
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.data import loader as loading
from fastdisco.evals.features import Features, ragged
from fastdisco.evals.linear import Source, Step


def cached(own: Features, batch: int, seed: int) -> Source:
    """Steps of `batch` images over all ranks in an order by (seed, epoch), the last what is left.
    The order is of the images' indices, so it does not show which rank has which."""
    every = ragged(own.index).sort().values
    # At each place in the sorted indices, this rank's row, or -1.
    row = torch.full_like(every, -1)
    row[torch.searchsorted(every, own.index)] = torch.arange(len(own.index), device=every.device)

    def source(epoch: int, start: int) -> Iterator[Step]:
        order = torch.from_numpy(loading.permutation(seed, epoch, len(every))).to(every.device)
        for places in order.split(batch)[start:]:
            rows = row[places]
            rows = rows[rows >= 0]
            yield Step(own.x[rows], own.label[rows], len(places))

    return source


def crops(
    loader: data.TrainLoader,
    indices: np.ndarray,
    encode: Callable[[Tensor], Tensor],
    batch: int,
    seed: int,
) -> Source:
    """Steps of `batch` images over all ranks, each image's view hashed from the loader's seed,
    the epoch and its index.

    loader   for batches of batch / ranks, with one crop; its own position is not touched
    indices  the images to train on
    encode   [n,3,S,S] -> [n,F], without gradient
    Raises UserError where the batch does not divide by the ranks."""
    ranks = dist.world()
    if batch % ranks:
        below = batch // ranks * ranks
        raise UserError(
            f"batch: {batch} images do not divide by {ranks} ranks; nearest: {below or ranks} or "
            f"{below + ranks}"
        )
    member = np.zeros(len(loader.listing.files), bool)
    member[indices] = True

    def source(epoch: int, start: int) -> Iterator[Step]:
        whole = loading.order(seed, epoch, loader.listing)
        steps = _split(whole[member[whole]], batch)[start:]
        share = batch // ranks
        own = [s[dist.rank() * share :][:share] for s in steps]
        batches = loader.views_of(np.concatenate(own) if own else whole[:0], epoch)
        for images, mine in zip(steps, own):
            if len(mine):
                now = next(batches)
                x = encode(now.views[0]).float()
                yield Step(x, now.label.to(x.device), len(images))
            else:
                yield Step(*_nothing(loader, encode), len(images))

    return source


def _split(order: np.ndarray, batch: int) -> list[np.ndarray]:
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def _nothing(loader: data.TrainLoader, encode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Features and labels of no image, for a rank that the last step leaves without."""
    size = loader.crops[0].size
    x = encode(torch.zeros(1, 3, size, size, device=loader.device)).float()
    return x[:0], torch.zeros(0, dtype=torch.int64, device=x.device)
