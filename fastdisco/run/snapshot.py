"""A snapshot of a training's state in host memory, which a thread can write while the training goes
on.  CheckFreq (FAST 2021) calls the two parts snapshot and persist."""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Snapshots:
    """Takes snapshots, each into the buffers of the one before: fresh memory would have to be mapped
    or pinned each time."""

    def __init__(self) -> None:
        self._buffers: list[torch.UntypedStorage] = []

    def take(self, state: T) -> T:
        """A copy of the state in host memory, pinned where it comes from a GPU.  It holds until the
        next call.

        state  nested dicts, lists and tuples, with tensors
        torch.save writes the same bytes of the copy as of the state: tensors that share memory do so
        in the copy, too, and those of a GPU keep its name.
        When it returns, all is copied.  Raises MemoryError where there is not enough."""
        tensors = list(_tensors(state))
        copies: dict[int, torch.UntypedStorage] = {}
        for x in tensors:
            # What torch.save tells storages apart by.
            key = x.untyped_storage()._cdata
            if key not in copies:
                copies[key] = self._copied(len(copies), x.untyped_storage())
        del self._buffers[len(copies) :]
        found = {id(x): _view(copies[x.untyped_storage()._cdata], x) for x in tensors}
        # The copies are in the order of the training's stream, so that nothing overwrites their
        # sources before.  The host waits here, since nothing else is queued behind the log point
        # before a save, and the stall that is logged is the whole one.
        for device in {x.device for x in tensors if x.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        # Its memo says which copies are there already.
        return copy.deepcopy(state, found)

    def _copied(self, i: int, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The i-th buffer with the storage's content."""
        on_gpu = storage.device.type == "cuda"
        known = self._buffers[i] if i < len(self._buffers) else None
        if known is None or known.nbytes() != storage.nbytes():
            known = _buffer(storage.nbytes(), on_gpu)
            self._buffers[i : i + 1] = [known]
        known.copy_(storage, non_blocking=True)
        # See _location.  UntypedStorage has no such attribute, but takes one, as Python's objects do.
        # pyrefly: ignore[missing-attribute]
        known._saved_as = torch.serialization.location_tag(storage)
        return known


def _buffer(size: int, pinned: bool) -> torch.UntypedStorage:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()
    except RuntimeError as e:
        raise MemoryError(str(e).partition("\n")[0]) from None


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in nested containers; deepcopy copies what else there is."""
    if type(value) is Tensor and not value.requires_grad and not value.__dict__:
        yield value
    elif isinstance(value, dict):
        for x in value.values():
            yield from _tensors(x)
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _tensors(x)


def _view(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=like.dtype)
    return empty.set_(storage, like.storage_offset(), like.size(), like.stride())


def _location(storage: Any) -> str | None:
    """Where torch.save says that a storage was: for a snapshot's, where its source is."""
    return getattr(storage, "_saved_as", None)


# Asked before torch's own, whose priorities begin with 10.
torch.serialization.register_package(5, _location, lambda storage, location: None)
