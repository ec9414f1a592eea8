"""Images in order, each once: the evaluation's loader, and what other passes over a data set share with
it.

Shapes: B images of a rank's batch, S side of a view."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdisco.common.errors import UserError
from fastdisco.common.heart import beat
from fastdisco.config import Crop
from fastdisco.data import pipelines, shards
from fastdisco.data.aside import Aside, Broken
from fastdisco.data.decoder import graphs
from fastdisco.data.folder import Listing
from fastdisco.data.placement import Placement, default_placement

# Evaluation normalises as it does, unless told otherwise.
DEFAULT = Crop()


class Batch(NamedTuple):
    """Views of images, all of one epoch."""

    # [B,3,S,S] float32 or float16 per crop, normalised, in channels_last memory, on the network's
    # device.
    views: list[Tensor]
    label: Tensor  # [B] int64, on the CPU
    index: Tensor  # [B] int64, on the CPU: the image's position in the listing
    # Whose views these are.  They are hashed from this, the index and the seed, nothing else.
    epoch: int = 0


class EvalLoader:
    """Images in order, each once; the last batch holds what is left.  It can be iterated again.
    len() is the number of images."""

    def __init__(
        self,
        listing: Listing,
        resize: int,
        size: int,
        batch: int,
        threads: int,
        device: torch.device,
        indices: Sequence[int] | np.ndarray | None = None,
        mean: Sequence[float] = DEFAULT.mean,
        std: Sequence[float] = DEFAULT.std,
        placement: Placement | None = None,
        interpolation: str = "linear",
    ) -> None:
        """The view is the image with its short side resized to `resize`, then a centre crop of
        `size`.

        indices        which images of the listing, in which order; None: all but the quarantine's
        interpolation  of the resize, linear or cubic, antialiased
        Raises UserError where the crop does not fit."""
        if size > resize:
            raise UserError(
                f"data.eval_size: a centre crop of {size} does not fit into a short side of "
                f"{resize} (data.eval_resize); lower it"
            )
        self.listing, self.batch, self.threads, self.device = listing, batch, threads, device
        self._interpolation = interpolation
        self.indices = listing.kept if indices is None else np.asarray(indices, np.int64)
        self.placement = placement or default_placement(device)
        self._view = resize, size, mean, std

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        def pipeline(reader: dict[str, Any], images: np.ndarray, batch: int) -> Any:
            settings = pipelines.settings(batch, self.threads, self.device, self.placement)
            settings |= {"interpolation": self._interpolation}
            return graphs().evaluate(*self._view, reader, self.placement, **settings)

        return each(
            self.listing, self.indices, 0, self.batch, self.device, self.placement, pipeline
        )


def each(
    listing: Listing,
    indices: np.ndarray,
    epoch: int,
    batch: int,
    device: torch.device,
    placement: Placement,
    pipeline: Callable[[dict[str, Any], np.ndarray, int], Any],
    aside: Aside | None = None,
) -> Iterator[Batch]:
    """Each of the images once, in that order; the last batch holds what is left.

    pipeline  (reader's arguments, indices, batch) -> a pipeline that is not built yet
    aside     takes the images that break, which are left out then; None: they raise UserError"""
    batch = max(1, min(batch, len(indices)))
    left, labels = indices, torch.from_numpy(listing.labels)
    while len(left):
        # DALI's batches are full, so the last image fills the last batch and is dropped again.
        padded = np.concatenate([left, left[-1:].repeat(-len(left) % batch)])
        some = min(shards.at_once(listing, padded, batch), max(1, pipelines.CHUNK // batch) * batch)
        now = padded[:some]
        make = lambda reader, now=now: pipeline(reader, now, batch)
        try:
            pipe = pipelines.build(listing, now, make)
            shards.ahead(listing, padded[some:])
            for i in range(len(now) // batch):
                views, index = pipelines.run(pipe, listing, now, i, batch, device, placement)
                # An evaluation is long, and this is its progress.
                beat()
                here = min(batch, len(left))
                index, left = index[:here], left[here:]
                yield Batch([v[:here] for v in views], labels[index], index, epoch)
        except Broken as e:
            if aside is None or not e.faults:
                raise e.error from e.__cause__
            aside.add(e)
            left = left[~np.isin(left, list(e.faults))]
