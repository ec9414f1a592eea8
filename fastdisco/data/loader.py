"""Loaders: batches of views for training, whose order is a function of (seed, position), and of
images in order for evaluation."""

import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdisco.common import dist
from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.config import Crop
from fastdisco.data import decoder, draws, shards
from fastdisco.data.decoder import graphs
from fastdisco.data.folder import Listing
from fastdisco.data.placement import Placement, default_placement

# Samples that one pipeline reads on a rank, at least one epoch: its list of files costs some 600
# bytes a sample.  Fewer in many tars.
CHUNK = 1 << 18


class Batch(NamedTuple):
    # [B,3,S,S] float32 or float16 per crop, normalised, in channels_last memory, on the network's
    # device.
    views: list[Tensor]
    label: Tensor  # [B] int64, on the CPU
    index: Tensor  # [B] int64, on the CPU: the image's position in the listing
    # Whose views these are: with the index and the seed, all that they are hashed from.
    epoch: int = 0


class TrainLoader:
    """Endless in epochs: iterates over micro batches from `start` to the end of training.

    Epoch e is a permutation of all images by (seed, e), less those of the quarantine: of files any
    permutation, of tars one that reads tar after tar (`shards.order`).  Its first steps_per_epoch x
    global batch are used, each once over all ranks; what remains differs by
    epoch.  An optimizer step takes a contiguous slice, split over micro batches and then ranks, so
            which images it
    holds depends on neither; and the whole state of the loader is `position`."""

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
    ):
        """batch: images per rank and micro batch.  threads: of the CPU, on this rank.  start: micro
        batches already seen.  placement: None is the usual. rounds: epoch e has the views (not the
        order) of epoch e mod rounds, as recorded embeddings need; None: every epoch has its own.

        permuted: all views but the first are of this rank's share of the batch permuted over ranks,
        as `dist.Shuffle` would split it; the views themselves are the same.  Label and index are
        the first view's.

        Raises UserError where the listing holds less than one global batch, or samples in tars that
        are sorted by class."""
        every, n = batch * dist.world() * accumulate, len(listing.kept)
        if n < every:
            raise UserError(
                f"{listing.root}: {n} images do not fill one step of {every} (data.batch); add "
                f"images or lower data.batch to {n} or less"
            )
        shards.refuse_sorted(listing)
        self.listing, self.crops, self.batch, self.seed, self.threads, self.device = (
            listing,
            tuple(crops),
            batch,
            seed,
            threads,
            device,
        )
        self.placement, self.rounds = placement or default_placement(device), rounds
        # Number of the first view, crops, which images they are of.
        self._parts = [(0, self.crops, self._order)]
        if permuted:
            self._parts = [(0, self.crops[:1], self._order), (1, self.crops[1:], self._permuted)]
        self.steps_per_epoch = n // every
        self._per_epoch = self.steps_per_epoch * accumulate
        self._end = epochs * self._per_epoch
        self.position = start

    @property
    def position(self) -> int:
        """Micro batches handed out, over all epochs; set it to go on from there."""
        return self._position

    @position.setter
    def position(self, micro: int):
        self._position = self._chunk_end = micro  # so the next batch opens a pipeline

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        if self.position >= self._end:
            raise StopIteration
        if self.position == self._chunk_end:
            self._open()
        parts = [
            _run(
                pipe,
                self.listing,
                images,
                self.position - self._chunk_start,
                self.batch,
                self.device,
                self.placement,
            )
            for pipe, images in zip(self._pipes, self._files_at)
        ]
        index, epoch = parts[0][1], self._round(self.position // self._per_epoch)
        self._position += 1
        return Batch(
            [view for views, _ in parts for view in views],
            torch.from_numpy(self.listing.labels)[index],
            index,
            epoch,
        )

    def recipe(self, views: int | None = None) -> dict:
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
        """Each of these images once, in that order, with the views of that epoch; the last batch is
        what is left.  Moves no position."""
        epoch = self._round(epoch)
        pipeline = lambda reader, now, batch: self._pipeline(
            0, self.crops, reader, draws.words(now, epoch), batch, self.threads
        )
        return _each(
            self.listing, indices, epoch, self.batch, self.device, self.placement, pipeline
        )

    def _pipeline(
        self,
        first: int,
        crops: tuple[Crop, ...],
        reader: dict,
        words: np.ndarray,
        batch: int,
        threads: int,
    ):
        """Of some of the method's views, from number `first` on, of the images with these words."""
        # Feed without self, which would live as long as its pipeline.
        words, seed, augment = words.reshape(-1, batch), self.seed, self.placement.augment

        def feed(i):
            # The reader, too, begins anew after the last.
            return draws.feed(crops, seed, words[i % len(words)], augment, first)

        return graphs().train(
            crops,
            reader,
            feed,
            self.placement,
            **_pipe(batch, threads, self.device, self.placement),
        )

    def _round(self, epoch: int) -> int:
        return epoch % self.rounds if self.rounds else epoch

    def _open(self):
        """Build the pipelines that read from `position` on, for some epochs."""
        per = self._per_epoch
        first = self.position // per
        epochs = range(first, min(first + max(1, CHUNK // (per * self.batch)), self._end // per))
        begin = (self.position - first * per) * self.batch
        orders = [[order(e) for e in epochs] for _, _, order in self._parts]
        ahead = [np.concatenate(o)[begin:] for o in orders]
        n = min(shards.at_once(self.listing, images, self.batch) for images in ahead)
        self._files_at = [images[:n] for images in ahead]
        self._chunk_start, self._chunk_end = self.position, self.position + n // self.batch
        self._pipes = []  # the old ones beside the new would hold twice the buffers
        threads = max(1, self.threads // len(self._parts))
        for (first_view, crops, _), order, images in zip(self._parts, orders, self._files_at):
            words = np.concatenate([draws.words(o, self._round(e)) for o, e in zip(order, epochs)])[
                begin : begin + n
            ]
            self._pipes.append(
                _built(
                    self.listing,
                    images,
                    lambda reader: self._pipeline(
                        first_view, crops, reader, words, self.batch, threads
                    ),
                )
            )

    def _order(self, epoch: int) -> np.ndarray:
        """Image indices of this rank in the epoch, [micro batches * batch]."""
        return (
            self._whole(epoch)
            .reshape(self._per_epoch, dist.world(), self.batch)[:, dist.rank()]
            .ravel()
        )

    def _permuted(self, epoch: int) -> np.ndarray:
        """The same, of each micro batch permuted over ranks."""
        micro = epoch * self._per_epoch
        return np.concatenate(
            [
                row[dist.Shuffle(self.batch, dist.mix(self.seed, micro + m)).mine]
                for m, row in enumerate(self._whole(epoch))
            ]
        )

    def _whole(self, epoch: int) -> np.ndarray:
        """Image indices of all ranks, [micro batches, ranks * batch]."""
        whole = order(self.seed, epoch, self.listing)
        if len(self.listing.left_out):
            # So the quarantine moves only what comes after.
            whole = whole[~np.isin(whole, self.listing.left_out)]
        return whole[: self._per_epoch * self.batch * dist.world()].reshape(self._per_epoch, -1)


class EvalLoader:
    """Images in order, each once, the last batch what is left; can be iterated again.  len() is the
    number of images."""

    def __init__(
        self,
        listing: Listing,
        resize: int,
        size: int,
        batch: int,
        threads: int,
        device: torch.device,
        indices: Sequence[int] | np.ndarray | None = None,
        mean=Crop().mean,
        std=Crop().std,
        placement: Placement | None = None,
    ):
        """resize: short side, then a centre crop of `size`.  indices: which images of the listing,
        in which order; None: all but the quarantine's."""
        if size > resize:
            raise UserError(
                f"data.eval_size: a centre crop of {size} does not fit into a short side of "
                f"{resize} (data.eval_resize); lower it"
            )
        self.listing, self.batch, self.threads, self.device = listing, batch, threads, device
        self.indices = listing.kept if indices is None else np.asarray(indices, np.int64)
        self._view, self.placement = (
            (resize, size, mean, std),
            placement or default_placement(device),
        )

    def __len__(self):
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        pipeline = lambda reader, now, batch: graphs().evaluate(
            *self._view,
            reader,
            self.placement,
            **_pipe(batch, self.threads, self.device, self.placement),
        )
        return _each(
            self.listing, self.indices, 0, self.batch, self.device, self.placement, pipeline
        )


def _each(
    listing: Listing,
    indices: np.ndarray,
    epoch: int,
    batch: int,
    device: torch.device,
    placement: Placement,
    pipeline: Callable,
) -> Iterator[Batch]:
    """Each of the images once, in that order, through pipeline(reader, indices, batch); the last
    batch is what is left."""
    n = len(indices)
    batch = min(batch, n)
    padded = np.concatenate([indices, indices[-1:].repeat(-n % batch)]) if n else indices
    while n:
        now = padded[: shards.at_once(listing, padded, batch)][: max(1, CHUNK // batch) * batch]
        pipe = _built(listing, now, lambda reader: pipeline(reader, now, batch))
        for i in range(len(now) // batch):
            views, index = _run(pipe, listing, now, i, batch, device, placement)
            here = min(batch, n)
            index = index[:here]
            yield Batch(
                [v[:here] for v in views], torch.from_numpy(listing.labels)[index], index, epoch
            )
            n -= here
        padded = padded[len(now) :]


def order(seed: int, epoch: int, listing: Listing) -> np.ndarray:
    """[N] int64, a permutation of all images by (seed, epoch)."""
    n = len(listing.files)
    return (
        shards.order(_keys(seed, epoch, n + len(listing.places.tars) + 1), listing.places)
        if listing.places
        else permutation(seed, epoch, n)
    )


def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    """[images] int64: the stable sort of random words."""
    return np.argsort(_keys(seed, epoch, images), kind="stable")


def _keys(seed: int, epoch: int, n: int) -> np.ndarray:
    """[n] uint64: the raw words of Philox4x64 with key (seed, epoch) and counter 0, not
    Generator.permutation, whose stream NumPy may change."""
    return np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)


def _pipe(batch: int, threads: int, device: torch.device, placement: Placement) -> dict:
    # None: DALI touches no driver.
    gpu = (torch.device(device).index or 0) if placement.out == "gpu" else None
    return dict(
        batch_size=batch,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=placement.prefetch,
    )


def _built(listing: Listing, indices: np.ndarray, pipeline: Callable):
    """pipeline(reader), built: by then DALI has read the index files of tars."""
    with tempfile.TemporaryDirectory(prefix="fastdisco-") as folder:
        pipe = pipeline(_reader(listing, indices, folder))
        try:
            pipe.build()
        except RuntimeError:
            gone = (
                [t for t in listing.places.tars if not (listing.root / t).is_file()]
                if listing.places
                else []
            )
            if not gone:
                raise
            raise UserError(
                f"{listing.root}: {shorten(gone)} is no longer there; put it back, then the same "
                "command continues",
                anywhere=True,
            ) from None
    return pipe


def _reader(listing: Listing, indices: np.ndarray, folder: str) -> dict:
    """What the graph's reader is told: these images in this order; `folder` takes the index files
    of tars."""
    if listing.places:
        return shards.reader(listing, indices, folder)
    return dict(file_root=str(listing.root), files=[listing.files[i] for i in indices.tolist()])


def _run(
    pipe,
    listing: Listing,
    indices: np.ndarray,
    i: int,
    batch: int,
    device: torch.device,
    placement: Placement,
) -> tuple[list[Tensor], Tensor]:
    """Views as [B,3,S,S] tensors without a copy, and the images' indices [B]; i: the batch's number
    since the pipeline was built.

    On a GPU nothing waits: the views are ready for what is launched on the current stream from here
    on, and DALI takes their memory back when the tensors are gone, after what that stream did with
    them until then."""
    try:
        views = pipe.run(torch.cuda.current_stream(device) if placement.out == "gpu" else None)
    except RuntimeError as e:
        # And what would stop the run next.
        ahead = np.unique(indices[i * batch : (i + 1 + placement.prefetch) * batch])
        bad = decoder.unreadable(
            listing, ahead, device if placement.decode == "gpu" else torch.device("cpu")
        )
        if not bad:
            raise
        names, source = [listing.files[j] for j in bad], shlex.quote(str(listing.source))
        raise UserError(
            f"{listing.root}: unreadable image{'s' * (len(bad) > 1)} {', '.join(names)}; replace, "
            f"or leave out by `fastdisco data check {source} --only {shlex.join(names)}`; the same "
            "command then continues from the last checkpoint",
            anywhere=True,
        ) from e
    return [torch.from_dlpack(v.as_tensor()).permute(0, 3, 1, 2) for v in views], torch.from_numpy(
        indices[i * batch : (i + 1) * batch].copy()
    )
