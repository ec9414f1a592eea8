"""The training's loader: batches of views, whose order is a function of (seed, position).

Shapes: N images of the listing, V views, B images of a rank's micro batch, S side of a view."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.config import Crop
from fastdisco.data import draws, pipelines, shards
from fastdisco.data.aside import Aside, Broken
from fastdisco.data.decoder import graphs
from fastdisco.data.each import Batch, each
from fastdisco.data.folder import Listing

# permutation is for those who know it by this module.
from fastdisco.data.orders import order, permutation  # noqa: F401
from fastdisco.data.placement import Placement, default_placement


class _Part(NamedTuple):
    """Consecutive views of the method that are of the same images; each part has a pipeline."""

    first: int  # number of its first view
    crops: tuple[Crop, ...]
    order: Callable[[int], np.ndarray]  # epoch -> indices of this rank's images


class TrainLoader:
    """Iterates over micro batches from `position` to the end of training.

    Epoch e is a permutation of all images by (seed, e), less those of the quarantine.  Of files it
    may be any permutation, of tars it is one that reads tar after tar (`shards.order`).  Its first
    steps_per_epoch x global batch images are used, each once over all ranks; which images remain
    differs by epoch.  In the places of images that broke meanwhile (`aside`) it has others.

    An optimizer step takes a contiguous slice of the permutation, which is split over micro batches
    and then over ranks.  So which images a step holds depends on neither, and the whole state of
    the loader is `position` and what is set aside."""

    def __init__(
        self,
        listing: Listing,
        crops: Sequence[Crop],
        batch: int,
        seed: int,
        epochs: int,
        accumulate: int,
        threads: int,
        device: torch.device,
        start: int = 0,
        placement: Placement | None = None,
        rounds: int | None = None,
        permuted: bool = False,
        bad_limit: float = 0.0,
    ) -> None:
        """Prepares the order; no image is read before the first batch.

        crops       one for each view
        batch       images per rank and micro batch
        accumulate  micro batches per optimizer step
        threads     of the CPU, on this rank
        start       micro batches that were handed out already
        placement   None: the configuration's default
        rounds      epoch e has the views (not the order) of epoch e mod rounds, as recorded
                    embeddings need; None: every epoch has its own
        permuted    all views but the first are of this rank's share of the batch permuted over
                    ranks, as `dist.Shuffle` would split it.  The views themselves stay the same;
                    label and index are the first view's
        bad_limit   of the images, the share that may break and be replaced; 0: the first one raises
                    UserError
        Raises UserError where the listing holds less than one global batch, or samples in tars that
        are sorted by class."""
        # Images of an optimizer step, and images to use.
        step, n = batch * dist.world() * accumulate, len(listing.kept)
        if n < step:
            raise UserError(
                f"{listing.shown}: {n} images do not fill one step of {step} (data.batch); add "
                f"images or lower data.batch to {n} or less"
            )
        shards.refuse_sorted(listing)
        self.listing, self.crops, self.batch, self.seed = listing, tuple(crops), batch, seed
        self.threads, self.device, self.rounds = threads, device, rounds
        self.placement = placement or default_placement(device)
        self.aside = Aside(listing, bad_limit)
        # Two ranks read each image then, and must have the same one in its place.
        self._together = permuted and self.aside.allowed > 0
        # Where a pipeline ended without a reason.
        self._failed: int | None = None
        self._parts = [_Part(0, self.crops, self._order)]
        if permuted:
            self._parts = [
                _Part(0, self.crops[:1], self._order),
                _Part(1, self.crops[1:], self._permuted),
            ]
        self.steps_per_epoch = n // step
        self._per_epoch = self.steps_per_epoch * accumulate  # micro batches
        self._end = epochs * self._per_epoch
        self.position = start

    @property
    def position(self) -> int:
        """Micro batches handed out, over all epochs; set it to go on from there."""
        return self._position

    @position.setter
    def position(self, micro: int) -> None:
        # With the chunk at its end, the next batch opens pipelines.
        self._position = self._chunk_end = micro

    @property
    def state(self) -> int | dict[str, Any]:
        """What a resume needs: the position, and which images are set aside, if any are."""
        if not self.aside:
            return self.position
        return {"position": self.position, "aside": dict(self.aside.images)}

    @state.setter
    def state(self, state: int | dict[str, Any]) -> None:
        """Raises ValueError for what is no such state."""
        found = state if isinstance(state, dict) else {"position": state, "aside": {}}
        position, aside = found.get("position"), found.get("aside")
        if type(position) is not int or position < 0 or not isinstance(aside, dict):
            raise ValueError("no position of a loader")
        n = len(self.listing.files)
        if not all(
            type(i) is int and 0 <= i < n and isinstance(why, str) for i, why in aside.items()
        ):
            raise ValueError(f"images are set aside that are none of these {n}")
        self.aside.images = dict(aside)
        self.position = position

    def recount(self, steps: int) -> None:
        """Goes on after `steps` optimizer steps, of which a command with another `accumulate` has
        set `state`: its position counts other micro batches."""
        if self.position:
            self.position = steps * (self._per_epoch // self.steps_per_epoch)

    @property
    def remaining(self) -> Listing:
        """The listing, which leaves out what is set aside."""
        return self.aside.without(self.listing)

    def agree(self) -> None:
        """Makes all ranks leave out, from the next batch on, what any of them has set aside.  Called
        by every rank between two steps.  Raises UserError, see `Aside.agree`."""
        if self.aside.agree():
            # The next batch opens pipelines.
            self.position = self.position

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self.position >= self._end:
            raise StopIteration
        parts = self._read_parts()
        # Made anew until no rank has found more.
        while self._together and self.aside.agree():
            self.position = self.position
            parts = self._read_parts()
        views = [view for views, _ in parts for view in views]
        # With permuted views, the other part is of other images.
        _, index = parts[0]
        epoch = self._round(self.position // self._per_epoch)
        self._position += 1
        return Batch(views, torch.from_numpy(self.listing.labels)[index], index, epoch)

    def _read_parts(self) -> list[tuple[list[Tensor], Tensor]]:
        """The next batch of each part; images that break are set aside."""
        while True:
            try:
                return self._next_parts()
            except Broken as e:
                self._set_aside(e)

    def _next_parts(self) -> list[tuple[list[Tensor], Tensor]]:
        if self.position == self._chunk_end:
            self._open()
        i = self.position - self._chunk_start
        return [
            pipelines.run(pipe, self.listing, images, i, self.batch, self.device, self.placement)
            for pipe, images in zip(self._pipes, self._chunk_images)
        ]

    def _set_aside(self, broken: Broken) -> None:
        """Has the next batch made by new pipelines, without the images that broke the old ones."""
        if broken.faults or self._failed == self.position or not self.aside.allowed:
            self.aside.add(broken)
        # An image that can be read again, or a disk that was away for a moment: once more.
        self._failed = self.position
        self.position = self.position

    def images_of(self, step: int) -> np.ndarray:
        """Indices of the images of an optimizer step, from 0, over all ranks and micro batches, as
        what is set aside now leaves them."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._whole(epoch).reshape(self.steps_per_epoch, -1)[within]

    def recipe(self, views: int | None = None) -> dict[str, Any]:
        """What decides, besides epoch and index, every pixel of the first `views` views, or of
        all."""
        crops = {str(v): c.model_dump(mode="json") for v, c in enumerate(self.crops[:views])}
        return {
            "data": self.listing.fingerprint,
            "seed": self.seed,
            "views": crops,
            "decode": self.placement.decode,
            "augment": self.placement.augment,
            "dali": graphs().VERSION,
        }

    def views_of(self, indices: np.ndarray, epoch: int) -> Iterator[Batch]:
        """Each of these images once, in that order, with the views of that epoch.  The last batch
        holds what is left.  `position` does not change.  Images that break are set aside and left
        out."""
        epoch = self._round(epoch)

        def pipeline(reader: dict[str, Any], images: np.ndarray, batch: int) -> Any:
            words = draws.words(images, epoch)
            return self._pipeline(0, self.crops, reader, words, batch, self.threads)

        return each(
            self.listing,
            indices,
            epoch,
            self.batch,
            self.device,
            self.placement,
            pipeline,
            self.aside,
        )

    def _pipeline(
        self,
        first: int,
        crops: tuple[Crop, ...],
        reader: dict[str, Any],
        words: np.ndarray,
        batch: int,
        threads: int,
    ) -> Any:
        """The pipeline of some of the method's views, from number `first` on, over the images with
        these words [batches * batch]."""
        # `feed` must not hold self, which would then live as long as its pipeline.
        words, seed, augment = words.reshape(-1, batch), self.seed, self.placement.augment

        def feed(i: int) -> list[np.ndarray]:
            # DALI reads ahead, and its reader, too, begins anew after the last batch.
            return draws.feed(crops, seed, words[i % len(words)], augment, first)

        settings = pipelines.settings(batch, threads, self.device, self.placement)
        return graphs().train(crops, reader, feed, self.placement, **settings)

    def _round(self, epoch: int) -> int:
        return epoch % self.rounds if self.rounds else epoch

    def _open(self) -> None:
        """Builds the pipelines that read from `position` on: a chunk of some epochs."""
        per = self._per_epoch
        first = self.position // per
        begin = (self.position - first * per) * self.batch  # images of `first` already handed out
        count = max(1, pipelines.CHUNK // (per * self.batch))
        epochs = range(first, min(first + count, self._end // per))
        orders = [[part.order(e) for e in epochs] for part in self._parts]
        images = [np.concatenate(order)[begin:] for order in orders]
        # All parts end at the same batch.
        n = min(shards.at_once(self.listing, some, self.batch) for some in images)
        self._chunk_images = [some[:n] for some in images]
        self._chunk_start, self._chunk_end = self.position, self.position + n // self.batch
        # Drops the old pipelines first: beside the new ones they would hold twice the buffers.
        self._pipes = []
        for part, of_part, some in zip(self._parts, orders, self._chunk_images):
            words = [draws.words(images, self._round(e)) for images, e in zip(of_part, epochs)]
            self._pipes.append(self._built(part, some, np.concatenate(words)[begin : begin + n]))
        if self.listing.remote:
            self._fetch_ahead(images[0][n:], epochs.stop)

    def _fetch_ahead(self, rest: np.ndarray, epoch: int) -> None:
        """Has the tars fetched of the images that come after those of the pipelines."""
        if epoch < self._end // self._per_epoch:
            rest = np.concatenate([rest, self._parts[0].order(epoch)])
        shards.ahead(self.listing, rest)

    def _built(self, part: _Part, images: np.ndarray, words: np.ndarray) -> Any:
        """The pipeline of a part over these images; words [n], what their views are hashed from."""
        threads = max(1, self.threads // len(self._parts))
        make = lambda reader: self._pipeline(
            part.first, part.crops, reader, words, self.batch, threads
        )
        return pipelines.build(self.listing, images, make)

    def _order(self, epoch: int) -> np.ndarray:
        """Image indices of this rank in the epoch, [micro batches * batch]."""
        by_rank = self._whole(epoch).reshape(self._per_epoch, dist.world(), self.batch)
        return by_rank[:, dist.rank()].ravel()

    def _permuted(self, epoch: int) -> np.ndarray:
        """The same with each micro batch permuted over ranks, as `dist.Shuffle` does."""
        micro = epoch * self._per_epoch
        mine = []
        for m, row in enumerate(self._whole(epoch)):
            shuffle = dist.Shuffle(self.batch, dist.mix(self.seed, micro + m))
            mine.append(row[shuffle.mine])
        return np.concatenate(mine)

    def _whole(self, epoch: int) -> np.ndarray:
        """Image indices of all ranks, [micro batches, ranks * batch]."""
        whole = order(self.seed, epoch, self.listing)
        # The quarantine leaves the permutation as it is, so it moves only what comes after its
        # images.
        if len(self.listing.left_out):
            whole = whole[~np.isin(whole, self.listing.left_out)]
        used = self._per_epoch * self.batch * dist.world()
        return self.aside.fill(whole[:used], whole[used:]).reshape(self._per_epoch, -1)
