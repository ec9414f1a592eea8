"""Loaders: batches of views for training, whose order is a function of (seed, position), and of images in order for evaluation."""
from typing import Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdisco import dist
from fastdisco.config import UserError
from fastdisco.data.folder import Listing
from fastdisco.views import Crop

CHUNK = 1 << 18  # samples that one pipeline reads on a rank, at least one epoch: its list of files costs some 600 bytes a sample
DEPTH = 2  # batches made ahead


class Batch(NamedTuple):
    views: list[Tensor]  # [B,3,S,S] float32 per crop, normalised, in channels_last memory
    label: Tensor  # [B] int64, on the CPU
    index: Tensor  # [B] int64, on the CPU: the image's position in the listing


class TrainLoader:
    """Endless in epochs: iterates over micro batches from `start` to the end of training.

    Epoch e is a permutation of all images by (seed, e).  Its first steps_per_epoch x global batch are used, each once over all ranks; what is
    left out differs by epoch.  An optimizer step takes a contiguous slice, split over micro batches and then ranks, so which images it
    holds depends on neither; and the whole state of the loader is `position`."""

    def __init__(self, listing: Listing, crops: Sequence[Crop], batch: int, seed: int, epochs: int, accumulate: int, threads: int,
                 device: torch.device, start: int = 0):
        """batch: images per rank and micro batch.  start: micro batches already seen; threads: of the CPU, on this rank.

        Raises UserError where the listing holds less than one global batch."""
        every, n = batch * dist.world() * accumulate, len(listing.files)
        if n < every:
            raise UserError(f"{listing.root}: {n} images do not fill one step of {every} (data.batch); add images or lower data.batch to {n} or less")
        self.listing, self.crops, self.batch, self.seed, self.threads, self.device = listing, tuple(crops), batch, seed, threads, device
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
        *views, words = _run(self._pipe, self.listing, self._files_at, self.position - self._chunk_start, self.batch, self.device)
        index = torch.from_numpy(_graph().indices(words, self.position // self._per_epoch))
        self._position += 1
        return Batch(views, torch.from_numpy(self.listing.labels)[index], index)

    def _open(self):
        """Build the pipeline that reads from `position` on, for some epochs."""
        graph, per = _graph(), self._per_epoch
        first = self.position // per
        epochs = range(first, min(first + max(1, CHUNK // (per * self.batch)), self._end // per))
        self._chunk_start, self._chunk_end = self.position, epochs.stop * per
        here = slice((self.position - first * per) * self.batch, (self._chunk_end - first * per) * self.batch)
        orders = [self._order(e) for e in epochs]
        self._files_at = np.concatenate(orders)[here]
        words = np.concatenate([graph.words(o, e) for o, e in zip(orders, epochs)])[here]
        reader = _reader(self.listing, self._files_at, words)
        self._pipe = None  # two at once would hold twice the buffers
        self._pipe = graph.train(self.crops, reader, self.seed, _kind(self.device), **_pipe(self.batch, self.threads, self.device))

    def _order(self, epoch: int) -> np.ndarray:
        """Image indices of this rank in the epoch, [micro batches * batch]."""
        whole = order(self.seed, epoch, len(self.listing.files))[: self._per_epoch * self.batch * dist.world()]
        return whole.reshape(self._per_epoch, dist.world(), self.batch)[:, dist.rank()].ravel()


class EvalLoader:
    """Images in order, each once, the last batch what is left; can be iterated again.  len() is the number of images."""

    def __init__(self, listing: Listing, resize: int, size: int, batch: int, threads: int, device: torch.device,
                 indices: Sequence[int] | None = None, mean=Crop().mean, std=Crop().std):
        """resize: short side, then a centre crop of `size`.  indices: which images of the listing, in which order; all of them if None."""
        if size > resize:
            raise UserError(f"data.eval_size: a centre crop of {size} does not fit into a short side of {resize} (data.eval_resize); lower it")
        self.listing, self.batch, self.threads, self.device = listing, batch, threads, device
        self.indices = np.arange(len(listing.files)) if indices is None else np.asarray(indices, np.int64)
        self._view = resize, size, mean, std

    def __len__(self):
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        n = len(self)
        if not n:
            return
        batch = min(self.batch, n)
        padded = np.concatenate([self.indices, self.indices[-1:].repeat(-n % batch)])
        pipe = _graph().evaluate(*self._view, _reader(self.listing, padded, padded), _kind(self.device), **_pipe(batch, self.threads, self.device))
        for i in range(len(padded) // batch):
            view, index = _run(pipe, self.listing, padded, i, batch, self.device)
            here = min(batch, n - i * batch)
            index = torch.from_numpy(index[:here].astype(np.int64))
            yield Batch([view[:here]], torch.from_numpy(self.listing.labels)[index], index)


def order(seed: int, epoch: int, images: int) -> np.ndarray:
    """[images] int64, a permutation: the stable sort of the raw words of Philox4x64 with key (seed, epoch) and counter 0.

    Raw words rather than Generator.permutation, whose stream NumPy may change."""
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(images)
    return np.argsort(words, kind="stable")


def _graph():
    """The graphs; DALI is an extra, so it is imported where it is first used."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        raise UserError("NVIDIA DALI is not installed, it reads the images; "
                        "pip install 'fastdisco[cuda13]', or 'fastdisco[cuda12]' for a CUDA 12 driver; both run without a GPU") from None
    from fastdisco.data import graph
    return graph


def _kind(device: torch.device) -> str:
    return "gpu" if torch.device(device).type == "cuda" else "cpu"


def _pipe(batch: int, threads: int, device: torch.device) -> dict:
    device = torch.device(device)
    gpu = (device.index or 0) if device.type == "cuda" else None  # None: DALI touches no driver
    return dict(batch_size=batch, num_threads=threads, device_id=gpu, prefetch_queue_depth=DEPTH)


def _reader(listing: Listing, indices: np.ndarray, labels: np.ndarray) -> dict:
    files = listing.files
    return dict(file_root=str(listing.root), files=[files[i] for i in indices.tolist()], labels=labels.tolist(), name="Reader")


def _run(pipe, listing: Listing, indices: np.ndarray, i: int, batch: int, device: torch.device) -> list:
    """Views as [B,3,S,S] tensors without a copy, and the reader's labels as NumPy [B]."""
    stream = torch.cuda.current_stream(device) if _kind(device) == "gpu" else None
    try:
        *views, label = pipe.run(stream)
    except RuntimeError as e:
        ahead = np.unique(indices[i * batch:(i + 1 + DEPTH) * batch])  # and what would stop the run next
        bad = _unreadable([listing.files[j] for j in ahead], listing, device)
        if not bad:
            raise
        error = UserError(f"{listing.root}: unreadable image{'s' * (len(bad) > 1)} {', '.join(bad)}; remove or replace")
        error.anywhere = True  # only this rank knows of it
        raise error from e
    return [torch.from_dlpack(v.as_tensor()).permute(0, 3, 1, 2) for v in views] + [np.array(label.as_tensor())[:, 0]]


def _unreadable(files: list[str], listing: Listing, device: torch.device) -> list[str]:
    """Those of the files that DALI does not decode, by halving."""
    pipe = _graph().decode(dict(file_root=str(listing.root), files=files), _kind(device), **_pipe(len(files), 1, device) | dict(prefetch_queue_depth=1))
    try:
        pipe.run()
    except RuntimeError:
        half = len(files) // 2
        return files if not half else _unreadable(files[:half], listing, device) + _unreadable(files[half:], listing, device)
    return []
