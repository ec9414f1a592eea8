"""Features of images, computed once and kept: what every evaluation without augmentation reads.

Letters: N images, F features."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco.common import dist
from fastdisco.common.errors import UserError


class Useless(UserError):
    """Features that tell nothing: no finite numbers, or the same for every image."""


class Features(NamedTuple):
    x: Tensor  # [N,F] float32, raw
    label: Tensor  # [N] int64, on the device of x
    index: Tensor  # [N] int64, on the device of x: positions in the listing

    def take(self, rows: Tensor) -> "Features":
        """The rows that an index or a mask names."""
        return Features(self.x[rows], self.label[rows], self.index[rows])


@torch.no_grad()
def collect(
    encode: Callable[[Tensor], dict[str, Tensor]],
    batches: Iterable,
    tick: Callable[[int], None] = lambda images: None,
) -> dict[str, Features]:
    """What a network makes of images, under one name for each kind, from one pass.

    encode   [B,3,S,S] -> {name: [B,...] of any float type}
    batches  of this rank's own part of the images, any size
    tick     is told the number of images after each batch"""
    parts: dict[str, list[Tensor]] = {}
    labels, indices = [], []
    for batch in batches:
        for name, x in encode(batch.views[0]).items():
            parts.setdefault(name, []).append(x.float())
        labels.append(batch.label)
        indices.append(batch.index)
        tick(len(batch.label))
    if not labels:
        raise UserError(
            f"rank {dist.rank()} of {dist.world()} gets none of the images; start fewer ranks",
            anywhere=True,
        )
    device = next(iter(parts.values()))[0].device
    label, index = (torch.cat(t).to(device) for t in (labels, indices))
    return {name: Features(torch.cat(xs), label, index) for name, xs in parts.items()}


def gathered(own: Features) -> Features:
    """Every rank's images in the order of their indices: the same on every rank, whatever part each
    had."""
    whole = Features(*(ragged(t) for t in own))
    return whole.take(whole.index.argsort(stable=True))


def ragged(x: Tensor) -> Tensor:
    """[n,...] with an n of each rank's own -> all rows in rank order."""
    if dist.world() == 1:
        return x
    counts = dist.all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = F.pad(x, (*(0, 0) * (x.ndim - 1), 0, max(counts) - len(x)))
    parts = dist.all_gather(padded).split(max(counts))
    return torch.cat([p[:n] for p, n in zip(parts, counts)])


def count(own: Tensor) -> int:
    """Rows over all ranks."""
    return int(dist.all_sum(torch.tensor(len(own), device=own.device)))


def refuse_useless(own: Features, what: str) -> None:
    """Raises Useless, on every rank alike, where the features are no finite numbers or are the
    same for every image.  what: names them in the sentence."""
    x = own.x.double()
    bad = dist.all_sum((~own.x.isfinite().all(1)).sum())
    if int(bad):
        raise Useless(
            f"{what}: the features of {int(bad)} images are no finite numbers; the network is "
            "broken or its precision too low, take another checkpoint or precision fp32"
        )
    n = count(own.x)
    mean = dist.all_sum(x.sum(0)) / n
    square = dist.all_sum((x - mean).square().sum()) / n
    if float(square) <= 1e-10 * float(mean.square().sum()):
        raise Useless(
            f"{what}: the features are the same for all {n} images; the network has collapsed or "
            "is broken, take another checkpoint"
        )


def refuse_few(
    own: Features, classes: int, what: str, least: int = 1, learned: bool = True
) -> None:
    """Raises UserError, on every rank alike, where all images are of one class or fewer than `least`
    are there.  learned: something learns from them, so there must be as many as classes."""
    n = count(own.x)
    seen = dist.all_sum(torch.bincount(own.label, minlength=classes))
    if int((seen > 0).sum()) < 2:
        raise UserError(
            f"{what}: all {n} images are of one class, so any answer would be right; give a data "
            "set with classes"
        )
    if n < least or (learned and n < classes):
        need = f"{least} neighbours" if n < least else f"{classes} classes"
        raise UserError(f"{what}: {n} images are fewer than {need}; give more images")
