"""Runs DALI's pipelines: their arguments, building them over the files or tars of a data set, and
batches as torch tensors.

Shapes: B images, S side of a view."""

import os
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdisco.common import temporary
from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import naming
from fastdisco.data import decoder, lines, shards
from fastdisco.data.aside import Broken
from fastdisco.data.folder import Listing
from fastdisco.data.placement import Placement

# Samples that one pipeline reads on a rank; of a training at least one epoch, since its list of files
# costs some 600 bytes a sample.  Fewer in many tars, see shards.at_once.
CHUNK = 1 << 18
NAMED = 20  # images that a sentence names

# Arguments of a DALI reader -> a pipeline that is not built yet.
Make = Callable[[dict[str, Any]], Any]


def settings(
    batch: int, threads: int, device: torch.device, placement: Placement
) -> dict[str, int | None]:
    """Arguments of DALI's Pipeline."""
    # With None, DALI touches no driver.
    gpu = (torch.device(device).index or 0) if placement.out == "gpu" else None
    return dict(
        batch_size=batch,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=placement.prefetch,
    )


def reader(listing: Listing, indices: np.ndarray, folder: str) -> dict[str, Any]:
    """Arguments of the graph's reader that make it read these images in this order.  `folder` takes
    the files that some need: index files of tars, or a list.  They are read while the pipeline is
    built."""
    if listing.places:
        return shards.reader(listing.places, listing.root, indices, folder)
    files = [listing.files[i] for i in indices.tolist()]
    if all(map(str.isascii, files)) or all(map(lines.is_utf8, files)):
        return dict(file_root=str(listing.root), files=files)
    # DALI's argument takes text, its list takes names of any bytes.  A line is a name and a label,
    # which no graph reads.
    path = Path(folder, "files")
    path.write_bytes(b"".join(os.fsencode(name) + b" 0\n" for name in files))
    return dict(file_root=str(listing.root), file_list=str(path))


def build(listing: Listing, indices: np.ndarray, make: Make) -> Any:
    """The pipeline make(reader's arguments) over these images, built.  Their tars stay in the cache
    while it lives.

    Raises Broken where a tar is gone or cut short."""
    held = shards.hold(listing, indices)
    with tempfile.TemporaryDirectory(prefix=temporary.prefix()) as folder:
        with naming(Path(folder)):
            pipe = make(reader(listing, indices, folder))
        if held:
            weakref.finalize(pipe, held.release)
        try:
            pipe.build()
        except RuntimeError as e:
            lost = shards.lost(listing, indices)
            if not lost:
                raise
            places = listing.places
            assert places
            tars = sorted({places.tars[places.tar[i]] for i in lost})
            raise Broken(
                lost,
                UserError(
                    f"{listing.shown}: {shorten(tars)} is no longer there, or not whole; put it "
                    "back, then the same command continues",
                    anywhere=True,
                ),
            ) from e
    return pipe


def run(
    pipe: Any,
    listing: Listing,
    indices: np.ndarray,
    i: int,
    batch: int,
    device: torch.device,
    placement: Placement,
) -> tuple[list[Tensor], Tensor]:
    """The next batch of a pipeline: views as [B,3,S,S] tensors in DALI's memory, or with
    placement.copy in torch's, and the images' indices [B].

    indices  of all images that the pipeline reads
    i        number of this batch since the pipeline was built
    On a GPU the host does not wait.  The views are ready for what is launched on the current stream
    from here on.
    Without a copy, DALI gets the memory back when the tensors are gone.  A thread of its own then
    calls cudaDeviceSynchronize, which waits for all that was launched on any stream until then, and
    spins on a core while it waits.  torch's allocator does not know this memory, so `record_stream`
    does nothing: drop a tensor only when all that reads it is launched.
    Raises Broken with the images that cannot be read; the pipeline is of no use then."""
    stream = torch.cuda.current_stream(device) if placement.out == "gpu" else None
    try:
        views = pipe.run(stream)
    except RuntimeError as e:
        # The pipeline is ahead, so the fault may be in a later batch; one sentence then names also
        # what would stop the run next.
        ahead = np.unique(indices[i * batch : (i + 1 + placement.prefetch) * batch])
        on = device if placement.decode == "gpu" else torch.device("cpu")
        faults = decoder.faults(listing, ahead, on)
        names = [listing.files[j] for j in faults]
        raise Broken(faults, _unreadable(listing, names) if names else e) from e
    take = partial(_copied, stream=stream) if placement.copy else torch.from_dlpack
    # DALI has the channels last.
    tensors = [take(v.as_tensor()).permute(0, 3, 1, 2) for v in views]
    return tensors, torch.from_numpy(indices[i * batch : (i + 1) * batch].copy())


def _copied(view: Any, stream: torch.cuda.Stream | None) -> Tensor:
    """DALI's dense tensor in memory of torch's own; on a GPU the copy is queued on the stream."""
    from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

    device = torch.device("cpu") if stream is None else stream.device
    own = torch.empty(view.shape(), dtype=to_torch_type[view.dtype], device=device)
    return feed_ndarray(view, own, cuda_stream=stream)


def _unreadable(listing: Listing, names: list[str]) -> UserError:
    source = lines.for_shell(str(listing.source))
    shown = shorten([lines.printable(name) for name in names], NAMED)
    # A command with thousands of names is no help: the whole set has to be looked at.
    few = len(names) <= NAMED
    only = f" --only {' '.join(map(lines.for_shell, names))}" if few else ""
    return UserError(
        f"{listing.shown}: unreadable image{'s' * (len(names) > 1)} {shown}; replace, or leave out "
        f"by `fastdisco data check {source}{only}`; the same command then continues from the last "
        "checkpoint",
        anywhere=True,
    )
