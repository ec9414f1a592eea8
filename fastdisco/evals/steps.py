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

    loader   with one crop; its batches as `chunk` says; its position is not touched
    indices  the images to train on
    encode   [n,3,S,S] -> [n,F], without gradient
    Raises UserError where the batch does not divide by the ranks."""
    ranks = dist.world()
    _refuse_indivisible(batch)
    member = np.zeros(len(loader.listing.files), bool)
    member[indices] = True

    def source(epoch: int, start: int) -> Iterator[Step]:
        whole = loading.order(seed, epoch, loader.listing)
        steps = _split(whole[member[whole]], batch)[start:]
        share = batch // ranks
        own = [s[dist.rank() * share :][:share] for s in steps]
        wanted = np.concatenate(own) if own else whole[:0]
        rows = _Rows(loader.views_of(wanted, epoch), encode, loader)
        for images, mine in zip(steps, own):
            yield Step(*rows.take(len(mine)), len(images))

    return source


def images(
    loader: data.TrainLoader, indices: np.ndarray, batch: int, seed: int
) -> Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]:
    """(epoch, first step) -> random crops [n,3,S,S] and labels [n] of this rank, for a network that
    is itself trained: every rank has as many.

    loader  with one crop, for batches of batch / ranks
    As torch's DistributedSampler does, the order is filled up from its beginning to a multiple of
    the ranks.  A last step of one image for each rank is left out: batch norm needs two."""
    ranks = dist.world()
    _refuse_indivisible(batch)
    member = np.zeros(len(loader.listing.files), bool)
    member[indices] = True

    def source(epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        whole = loading.order(seed, epoch, loader.listing)
        whole = whole[member[whole]]
        whole = np.concatenate([whole, np.resize(whole, -len(whole) % ranks)])
        steps = [s.reshape(ranks, -1)[dist.rank()] for s in _split(whole, batch)]
        wanted = [s for s in steps if len(s) > 1][start:]
        if wanted:
            for found in loader.views_of(np.concatenate(wanted), epoch):
                yield found.views[0], found.label.to(found.views[0].device)

    return source


def chunk(batch: int, most: int) -> int:
    """Images for the loader of `crops`: as many as `most` allows of which a rank's share of a step
    is a multiple.  So every step begins with a batch of its own, and a resumed evaluation rounds
    as one that was never stopped."""
    share = max(1, batch // dist.world())
    return next(n for n in range(min(share, most), 0, -1) if share % n == 0)


def _refuse_indivisible(batch: int) -> None:
    ranks = dist.world()
    if batch % ranks:
        below = batch // ranks * ranks
        raise UserError(
            f"batch: {batch} images do not divide by {ranks} ranks; nearest: {below or ranks} or "
            f"{below + ranks}"
        )


def _split(order: np.ndarray, batch: int) -> list[np.ndarray]:
    return [order[i : i + batch] for i in range(0, len(order), batch)]


class _Rows:
    """Features and labels of batches as they come, handed out in other portions."""

    def __init__(
        self,
        batches: Iterator[data.Batch],
        encode: Callable[[Tensor], Tensor],
        loader: data.TrainLoader,
    ) -> None:
        self.batches, self.encode, self.loader = batches, encode, loader
        self.left: tuple[Tensor, Tensor] | None = None

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """The next n, which there must be."""
        parts = [] if self.left is None else [self.left]
        while sum(len(y) for _, y in parts) < n:
            batch = next(self.batches)
            x = self.encode(batch.views[0]).float()
            parts.append((x, batch.label.to(x.device)))
        x, y = (torch.cat(t) for t in zip(*(parts or [self._nothing()])))
        self.left = x[n:], y[n:]
        return x[:n], y[:n]

    def _nothing(self) -> tuple[Tensor, Tensor]:
        """Features and labels of no image: the last step may leave a rank without."""
        size = self.loader.crops[0].size
        x = self.encode(torch.zeros(1, 3, size, size, device=self.loader.device)).float()[:0]
        return x, torch.zeros(0, dtype=torch.int64, device=x.device)
