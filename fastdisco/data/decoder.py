"""Which encoded images the decoder of the training refuses, or decodes with a complaint."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import numpy as np
import torch

from fastdisco.common.errors import UserError
from fastdisco.data.folder import Listing
from fastdisco.data.placement import default_placement, kind

BATCH = 64  # images that `faults` decodes at a time

# What libjpeg and libtiff say of damage in the picture itself.  They also speak of colour profiles,
# unknown tags and the like.
COMPLAINT = re.compile(
    r"Corrupt JPEG data(?!: bad ICC)|premature end|inconsistent progression|not enough data"
    r"|code not yet in table|not terminated with EOI|read error",
    re.IGNORECASE,
)


def graphs() -> ModuleType:
    """The module of DALI graphs, imported at the first use, since DALI is an extra.

    Raises UserError where DALI is not installed."""
    # DALI keeps its buffers, else the kernel clears new pages for every batch.
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "4M")
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        raise UserError(
            "NVIDIA DALI is not installed, it reads the images; pip install 'fastdisco[cuda13]', or "
            "'fastdisco[cuda12]' for a CUDA 12 driver; both run without a GPU"
        ) from None
    from fastdisco.data import graph

    return graph


class Decoder:
    """Decodes batches, one at a time, only to find their faults."""

    def __init__(self, device: torch.device, batch: int, threads: int) -> None:
        """batch: the most images that `faults` may be given."""
        self._device, self._batch, self._threads = torch.device(device), batch, threads
        self._images: list[np.ndarray] = []
        self._start()

    def _start(self) -> None:
        on_gpu = kind(self._device) == "gpu"
        self._pipe = graphs().decode(
            lambda: self._images,
            default_placement(self._device),
            batch_size=self._batch,
            num_threads=self._threads,
            prefetch_queue_depth=1,
            device_id=(self._device.index or 0) if on_gpu else None,
            # Nothing runs ahead, so that what DALI prints is about this very batch.
            exec_async=False,
            exec_pipelined=False,
        )
        self._pipe.build()

    def faults(self, images: Sequence[bytes], complaints: bool) -> dict[int, str]:
        """{position: the decoder's words} of images that it refuses.  DALI refuses whole batches,
        so the images are found by halving.

        complaints: also images that it decodes while saying that the data is corrupt.  libjpeg says
        so on the process's stderr, and it is the only sign of damage inside a JPEG, which otherwise
        becomes a damaged picture."""
        words, printed = self._run(images)
        if not words and not (complaints and printed):
            return {}
        if len(images) == 1:
            return {0: printed or words}
        half = len(images) // 2
        first = self.faults(images[:half], complaints)
        second = self.faults(images[half:], complaints)
        return first | {half + i: said for i, said in second.items()}

    def _run(self, images: Sequence[bytes]) -> tuple[str, str]:
        """The decoder's error and its complaint about a batch, empty where there is none."""
        self._images = [np.frombuffer(x, np.uint8) for x in images]
        words = ""
        with _stderr() as said:
            try:
                self._pipe.run()
            except RuntimeError as e:
                words = _sentence(str(e))
                # A pipeline is dead after an error.
                self._start()
        return words, _first_line(said(), COMPLAINT)


def faults(listing: Listing, indices: np.ndarray, device: torch.device) -> dict[int, str]:
    """Those of the images that cannot be read or decoded, ascending, each with the reason."""
    bad: dict[int, str] = {}
    decoder = Decoder(device, BATCH, 1)
    for start in range(0, len(indices), BATCH):
        found: dict[int, bytes] = {}
        for i in indices[start : start + BATCH].tolist():
            try:
                found[i] = listing.read(i)
            except OSError as e:
                bad[i] = e.strerror or str(e)
        bad |= {i: "empty" for i, content in found.items() if not content}
        found = {i: content for i, content in found.items() if content}
        if found:
            at = list(found)
            words = decoder.faults(list(found.values()), complaints=False)
            bad |= {at[j]: said for j, said in words.items()}
    return dict(sorted(bad.items()))


@contextlib.contextmanager
def _stderr() -> Iterator[Callable[[], str]]:
    """Catches what the process writes to its stderr, C libraries included.  Yields a function that
    returns it afterwards."""
    sys.stderr.flush()
    keep = os.dup(2)
    with tempfile.TemporaryFile() as f:
        os.dup2(f.fileno(), 2)
        text = []
        try:
            yield lambda: text[0]
        finally:
            sys.stderr.flush()
            os.dup2(keep, 2)
            os.close(keep)
            f.seek(0)
            text.append(f.read().decode(errors="replace"))


def _first_line(printed: str, of: re.Pattern[str]) -> str:
    """The first line that matches, without colours and the decoder's name."""
    line = next((x for x in printed.splitlines() if of.search(x)), "")
    return re.sub(r"\x1b\[[\d;]*m|\[\w+\]", "", line).strip()


def _sentence(error: str) -> str:
    """What DALI's error says after `encountered:`."""
    text = error.split("encountered:")[-1]
    text = text.replace("Current pipeline object is no longer valid.", "")
    return " ".join(text.split()) or "refused by DALI"
