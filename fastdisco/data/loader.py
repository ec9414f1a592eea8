"""Loaders: batches of views for training, whose order is a function of (seed, position), and of images in order for evaluation."""
import shlex
import tempfile
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdisco import dist
from fastdisco.config import UserError
from fastdisco.data import decoder, draws, shards
from fastdisco.data.decoder import graphs
from fastdisco.data.folder import Listing, some
from fastdisco.data.way import Way, usual
from fastdisco.views import Crop

CHUNK = 1 << 18  # samples that one pipeline reads on a rank, at least one epoch: its list of files costs some 600 bytes a sample.  Fewer in many tars


class Batch(NamedTuple):
    views: list[Tensor]  # [B,3,S,S] float32 or float16 per crop, normalised, in channels_last memory, on the network's device
    label: Tensor  # [B] int64, on the CPU
    index: Tensor  # [B] int64, on the CPU: the image's position in the listing


class TrainLoader:
    """Endless in epochs: iterates over micro batches from `start` to the end of training.

    Epoch e is a permutation of all images by (seed, e), less those of the quarantine: of files any permutation, of tars one that reads tar
    after tar (`shards.order`).  Its first steps_per_epoch x global batch are used, each once over all ranks; what remains differs by
    epoch.  An optimizer step takes a contiguous slice, split over micro batches and then ranks, so which images it
    holds depends on neither; and the whole state of the loader is `position`."""

    def __init__(self, listing: Listing, crops: Sequence[Crop], batch: int, seed: int, epochs: int, accumulate: int, threads: int,
                 device: torch.device, start: int = 0, way: Way | None = None):
        """batch: images per rank and micro batch.  threads: of the CPU, on this rank.  start: micro batches already seen.  way: None is the usual.

        Raises UserError where the listing holds less than one global batch, or samples in tars that are sorted by class."""
        every, n = batch * dist.world() * accumulate, len(listing.kept)
        if n < every:
            raise UserError(f"{listing.root}: {n} images do not fill one step of {every} (data.batch); add images or lower data.batch to {n} or less")
        shards.refuse_sorted(listing)
        self.listing, self.crops, self.batch, self.seed, self.threads, self.device = listing, tuple(crops), batch, seed, threads, device
        self.way = way or usual(device)
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
        views, index = _run(self._pipe, self.listing, self._files_at, self.position - self._chunk_start, self.batch, self.device, self.way)
        self._position += 1
        return Batch(views, torch.from_numpy(self.listing.labels)[index], index)

    def _open(self):
        """Build the pipeline that reads from `position` on, for some epochs."""
        per = self._per_epoch
        first = self.position // per
        epochs = range(first, min(first + max(1, CHUNK // (per * self.batch)), self._end // per))
        orders = [self._order(e) for e in epochs]
        begin = (self.position - first * per) * self.batch
        ahead = np.concatenate(orders)[begin:]
        self._files_at = ahead[:shards.at_once(self.listing, ahead, self.batch)]
        words = np.concatenate([draws.words(o, e) for o, e in zip(orders, epochs)])[begin:begin + len(self._files_at)].reshape(-1, self.batch)

        crops, seed, augment = self.crops, self.seed, self.way.augment  # feed without self, which would live as long as its pipeline

        def feed(i):
            return draws.feed(crops, seed, words[i % len(words)], augment)  # the reader, too, begins anew after the last

        self._chunk_start, self._chunk_end = self.position, self.position + len(self._files_at) // self.batch
        self._pipe = None  # two at once would hold twice the buffers
        self._pipe = _built(self.listing, self._files_at, lambda reader: graphs().train(
            self.crops, reader, feed, self.way, **_pipe(self.batch, self.threads, self.device, self.way)))

    def _order(self, epoch: int) -> np.ndarray:
        """Image indices of this rank in the epoch, [micro batches * batch]."""
        whole = order(self.seed, epoch, self.listing)
        if len(self.listing.left_out):
            whole = whole[~np.isin(whole, self.listing.left_out)]  # so the quarantine moves only what comes after
        whole = whole[: self._per_epoch * self.batch * dist.world()]
        return whole.reshape(self._per_epoch, dist.world(), self.batch)[:, dist.rank()].ravel()


class EvalLoader:
    """Images in order, each once, the last batch what is left; can be iterated again.  len() is the number of images."""

    def __init__(self, listing: Listing, resize: int, size: int, batch: int, threads: int, device: torch.device,
                 indices: Sequence[int] | None = None, mean=Crop().mean, std=Crop().std, way: Way | None = None):
        """resize: short side, then a centre crop of `size`.  indices: which images of the listing, in which order; None: all but the quarantine's."""
        if size > resize:
            raise UserError(f"data.eval_size: a centre crop of {size} does not fit into a short side of {resize} (data.eval_resize); lower it")
        self.listing, self.batch, self.threads, self.device = listing, batch, threads, device
        self.indices = listing.kept if indices is None else np.asarray(indices, np.int64)
        self._view, self.way = (resize, size, mean, std), way or usual(device)

    def __len__(self):
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        n = len(self)
        if not n:
            return
        batch = min(self.batch, n)
        padded = np.concatenate([self.indices, self.indices[-1:].repeat(-n % batch)])
        while n:
            now = padded[:shards.at_once(self.listing, padded, batch)]
            pipe = _built(self.listing, now, lambda reader: graphs().evaluate(*self._view, reader, self.way,
                                                                              **_pipe(batch, self.threads, self.device, self.way)))
            for i in range(len(now) // batch):
                views, index = _run(pipe, self.listing, now, i, batch, self.device, self.way)
                here = min(batch, n)
                index = index[:here]
                yield Batch([view[:here] for view in views], torch.from_numpy(self.listing.labels)[index], index)
                n -= here
            padded = padded[len(now):]


def order(seed: int, epoch: int, listing: Listing) -> np.ndarray:
    """[N] int64, a permutation of all images by (seed, epoch)."""
    n = len(listing.files)
    return shards.order(_keys(seed, epoch, n + len(listing.places.tars) + 1), listing.places) if listing.places else permutation(seed, epoch, n)


def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    """[images] int64: the stable sort of random words."""
    return np.argsort(_keys(seed, epoch, images), kind="stable")


def _keys(seed: int, epoch: int, n: int) -> np.ndarray:
    """[n] uint64: the raw words of Philox4x64 with key (seed, epoch) and counter 0, not Generator.permutation, whose stream NumPy may change."""
    return np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)


def _pipe(batch: int, threads: int, device: torch.device, way: Way) -> dict:
    gpu = (torch.device(device).index or 0) if way.out == "gpu" else None  # None: DALI touches no driver
    return dict(batch_size=batch, num_threads=threads, device_id=gpu, prefetch_queue_depth=way.prefetch)


def _built(listing: Listing, indices: np.ndarray, pipeline: Callable):
    """pipeline(reader), built: by then DALI has read the index files of tars."""
    with tempfile.TemporaryDirectory(prefix="fastdisco-") as folder:
        pipe = pipeline(_reader(listing, indices, folder))
        try:
            pipe.build()
        except RuntimeError:
            gone = [t for t in listing.places.tars if not (listing.root / t).is_file()] if listing.places else []
            if not gone:
                raise
            error = UserError(f"{listing.root}: {some(gone)} is no longer there; put it back, then the same command continues")
            error.anywhere = True
            raise error from None
    return pipe


def _reader(listing: Listing, indices: np.ndarray, folder: str) -> dict:
    """What the graph's reader is told: these images in this order; `folder` takes the index files of tars."""
    if listing.places:
        return shards.reader(listing, indices, folder)
    return dict(file_root=str(listing.root), files=[listing.files[i] for i in indices.tolist()])


def _run(pipe, listing: Listing, indices: np.ndarray, i: int, batch: int, device: torch.device, way: Way) -> tuple[list[Tensor], Tensor]:
    """Views as [B,3,S,S] tensors without a copy, and the images' indices [B]; i: the batch's number since the pipeline was built.

    On a GPU nothing waits: the views are ready for what is launched on the current stream from here on, and DALI takes their memory back when
    the tensors are gone, after what that stream did with them until then."""
    try:
        views = pipe.run(torch.cuda.current_stream(device) if way.out == "gpu" else None)
    except RuntimeError as e:
        ahead = np.unique(indices[i * batch:(i + 1 + way.prefetch) * batch])  # and what would stop the run next
        bad = decoder.unreadable(listing, ahead, device if way.decode == "gpu" else torch.device("cpu"))
        if not bad:
            raise
        names, source = [listing.files[j] for j in bad], shlex.quote(str(listing.source))
        error = UserError(f"{listing.root}: unreadable image{'s' * (len(bad) > 1)} {', '.join(names)}; replace, or leave out by "
                          f"`fastdisco data check {source} --only {shlex.join(names)}`; the same command then continues from the last checkpoint")
        error.anywhere = True  # only this rank knows of it
        raise error from e
    return [torch.from_dlpack(v.as_tensor()).permute(0, 3, 1, 2) for v in views], torch.from_numpy(indices[i * batch:(i + 1) * batch].copy())
