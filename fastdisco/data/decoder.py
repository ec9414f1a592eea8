"""Which encoded images the decoder of the training refuses, or takes with a complaint."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
import torch

from fastdisco.common.errors import UserError
from fastdisco.data.folder import Listing
from fastdisco.data.placement import default_placement, kind


def graphs():
    """The module of DALI graphs; DALI is an extra, so it is imported where it is first used."""
    # Buffers are kept, else the kernel clears new pages for every batch.
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


# of libjpeg and libtiff about the picture itself; they also speak of colour profiles, unknown tags
# and the like
COMPLAINT = re.compile(
    r"Corrupt JPEG data(?!: bad ICC)|premature end|inconsistent progression|not enough data|code "
    r"not yet in table|"
    r"not terminated with EOI|read error",
    re.IGNORECASE,
)


class Decoder:
    """Decodes batches, one at a time, for nothing but their faults."""

    def __init__(self, device: torch.device, batch: int, threads: int):
        """batch: images at most."""
        device = torch.device(device)
        self._make = lambda: graphs().decode(
            lambda: self._images,
            default_placement(device),
            batch_size=batch,
            num_threads=threads,
            prefetch_queue_depth=1,
            device_id=(device.index or 0) if kind(device) == "gpu" else None,
            # So that what DALI prints is of this very batch.
            exec_async=False,
            exec_pipelined=False,
        )
        self._start()

    def _start(self):
        self._pipe = self._make()
        self._pipe.build()

    def faults(self, images: Sequence[bytes], complaints: bool) -> dict[int, str]:
        """{position: the decoder's words} of images that it refuses, found by halving.

        complaints: also of those that it decodes while saying that the data is corrupt, which
        libjpeg does on the process's stderr: the only sign of damage inside a JPEG, which otherwise
        is decoded to a damaged picture."""
        self._images = [np.frombuffer(x, np.uint8) for x in images]
        with _stderr() as said:
            try:
                self._pipe.run()
                words = ""
            except RuntimeError as e:
                words = _sentence(str(e))
                self._start()  # a pipeline is dead after an error
        printed = _plain(said(), COMPLAINT)
        if not words and not (complaints and printed):
            return {}
        if len(images) == 1:
            return {0: printed or words}
        half = len(images) // 2
        return self.faults(images[:half], complaints) | {
            half + i: w for i, w in self.faults(images[half:], complaints).items()
        }


def unreadable(listing: Listing, indices: np.ndarray, device: torch.device) -> list[int]:
    """Those of the images that cannot be read or decoded."""
    bad, found, images = [], [], []
    for i in indices.tolist():
        try:
            content = listing.read(i)
        except OSError:
            content = b""
        if content:
            found.append(i)
            images.append(content)
        else:
            bad.append(i)
    decoder = Decoder(device, 64, 1)
    for at in range(0, len(images), 64):
        bad += [found[at + j] for j in decoder.faults(images[at : at + 64], complaints=False)]
    return sorted(bad)


@contextlib.contextmanager
def _stderr():
    """Takes what the process writes to its stderr, C libraries included; yields a function that
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


def _plain(printed: str, of: re.Pattern) -> str:
    """The first line of the kind, without colours and the decoder's name."""
    line = next((x for x in printed.splitlines() if of.search(x)), "")
    return re.sub(r"\x1b\[[\d;]*m|\[\w+\]", "", line).strip()


def _sentence(error: str) -> str:
    """What DALI's error says after `encountered:`."""
    text = error.split("encountered:")[-1].replace(
        "Current pipeline object is no longer valid.", ""
    )
    return " ".join(text.split()) or "refused by DALI"
