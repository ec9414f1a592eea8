"""Loaders: which image comes when, handed from DALI to torch without a copy."""
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdisco import dist
from fastdisco.config import UserError
from fastdisco.data.folder import Listing
from fastdisco.data.pipeline import eval_pipeline, train_pipeline
from fastdisco.views import Crop

CHUNK = 2**20  # samples a rank reads from one pipeline; building the next costs well under a second


class Batch(NamedTuple):
    views: list[Tensor]  # one [B,3,S,S] per crop; float32, normalised, channels_last
    label: Tensor  # [B] int64; for evaluation and tests, no method reads it
    index: Tensor  # [B] int64; the image's position in the listing: what its views are hashed from


class TrainLoader:
    """An iterator over the micro batches of this rank, from `position` to the end of the last epoch.

    Micro batch g holds the same images for any number of ranks and accumulated micro batches that make up the same global batch: an epoch's order
    is a permutation by (seed, epoch), its first steps_per_epoch global batches are used, and each rank takes its slice.  What is left over
    differs from epoch to epoch.  So `position` is the whole state."""

    def __init__(self, listing: Listing, crops: tuple[Crop, ...], batch: int, seed: int, epochs: int, accumulate: int, threads: int,
                 device: torch.device):
        """batch: images of a rank's micro batch.  Raises UserError where the images do not fill one step."""
        self.listing, self.crops, self.batch, self.seed, self.epochs, self.threads, self.device = listing, crops, batch, seed, epochs, threads, device
        step = batch * dist.world() * accumulate
        self.steps_per_epoch = len(listing.files) // step
        if not self.steps_per_epoch:
            raise UserError(f"{listing.root}: {len(listing.files)} images do not fill one step of data.batch {step}; lower it or add images")
        self.micro_per_epoch = self.steps_per_epoch * accumulate
        self._labels = torch.from_numpy(listing.labels)
        self.position = 0

    @property
    def position(self) -> int:
        """Micro batches handed out since the training began; settable."""
        return self._position

    @position.setter
    def position(self, micro: int):
        self._position, self._pipeline = micro, None

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        if self._position == self.epochs * self.micro_per_epoch:
            raise StopIteration
        if self._pipeline is None or self._position == self._end:
            self._build()
        *views, number = _run(self._pipeline, self.device, lambda: self._upcoming())
        self._position += 1
        index = number.flatten().to(torch.int64).cpu() % len(self.listing.files)
        return Batch(views, self._labels[index], index)

    def order(self, epoch: int) -> np.ndarray:
        """The indices that an epoch uses, in their order over all ranks."""
        n = self.micro_per_epoch * self.batch * dist.world()
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.listing.files))[:n]

    def _build(self):
        """The pipeline of the next chunk: the rest of this epoch and as many whole ones as CHUNK holds."""
        images = len(self.listing.files)
        first = self._position // self.micro_per_epoch
        more = min(CHUNK // (self.micro_per_epoch * self.batch), 2**31 // images - 1)  # a sample's number is an int32
        last = min(first + max(1, more), self.epochs)
        parts = [self._mine(self.order(e)) + (e - first) * images for e in range(first, last)]
        self._numbers = np.concatenate(parts)[(self._position - first * self.micro_per_epoch) * self.batch:]
        self._begin, self._end = self._position, last * self.micro_per_epoch
        files = [self.listing.files[i] for i in self._numbers % images]
        self._pipeline = train_pipeline(str(self.listing.root), files, self._numbers.tolist(), images, first, self.crops, self.seed, self.batch,
                                        self.threads, self.device.index if self.device.type == "cuda" else None)

    def _mine(self, order: np.ndarray) -> np.ndarray:
        return order.reshape(-1, dist.world(), self.batch)[:, dist.rank()].ravel()

    def _upcoming(self) -> list[Path]:
        """Files of this micro batch and of those that DALI prefetches."""
        at = (self._position - self._begin) * self.batch
        return [self.listing.root / self.listing.files[i] for i in self._numbers[at:at + 4 * self.batch] % len(self.listing.files)]


class EvalLoader:
    """Batches of one view, resized and centre-cropped, of the given images in their order; the last may be smaller."""

    def __init__(self, listing: Listing, resize: int, size: int, batch: int, threads: int, device: torch.device, indices: np.ndarray | None = None,
                 mean: tuple[float, float, float] = Crop().mean, std: tuple[float, float, float] = Crop().std):
        if size > resize:
            raise UserError(f"data.eval_size: a crop of {size} does not fit images resized to {resize}; raise data.eval_resize")
        self.listing, self.batch, self.device = listing, batch, device
        self.indices = np.arange(len(listing.files)) if indices is None else np.asarray(indices)
        self._labels = torch.from_numpy(listing.labels)
        self._make = lambda files: eval_pipeline(str(listing.root), files, self.indices.tolist(), resize, size, mean, std, batch, threads,
                                                 device.index if device.type == "cuda" else None)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        if not len(self.indices):
            return
        files = [self.listing.files[i] for i in self.indices]
        pipeline = self._make(files)
        for at in range(0, len(files), self.batch):
            upcoming = [self.listing.root / f for f in files[at:at + 4 * self.batch]]
            view, number = _run(pipeline, self.device, lambda: upcoming)
            n = min(self.batch, len(files) - at)  # DALI goes on with the first files again
            index = number.flatten().to(torch.int64).cpu()[:n]
            yield Batch([view[:n]], self._labels[index], index)


def _run(pipeline, device: torch.device, upcoming) -> list[Tensor]:
    """The pipeline's next outputs as torch tensors that share its memory, images as [B,3,S,S] in channels_last."""
    try:
        # on a GPU DALI hands over in the order of torch's stream: nobody waits
        out = pipeline.run(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else pipeline.run()
    except RuntimeError as e:
        raise _unreadable(upcoming(), e) from e
    tensors = [torch.from_dlpack(x.as_tensor()) for x in out]
    return [t.permute(0, 3, 1, 2) if t.dim() == 4 else t for t in tensors]


def _unreadable(files: list[Path], error: RuntimeError) -> UserError:
    """Names the files that cannot be decoded; DALI's own text often does not."""
    bad = [f for f in dict.fromkeys(files) if not _decodes(f)]
    if bad:
        found = UserError(f"{', '.join(map(str, bad[:5]))}{f' and {len(bad) - 5} more' if bad[5:] else ''}: cannot be decoded as an image; "
                          "replace or remove it, then start the same command again")
    else:
        found = UserError(f"one of {', '.join(map(str, files[:8]))} ...: DALI failed ({str(error).splitlines()[0]}); replace or remove it, "
                          "then start the same command again")
    found.anywhere = True  # only this rank knows of it
    return found


def _decodes(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.convert("RGB")
        return True
    except Exception:  # PIL raises many kinds for broken files
        return False
