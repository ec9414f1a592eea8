"""The queue of keys: a ring of unit rows, one and the same on every rank.  MoCo, arXiv:1911.05722, section 3.2."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Queue(nn.Module):
    """rows [K,d] float32 unit rows, drawn by `seed` at first; ptr, int64: where the next key goes.  Both are buffers and never move."""

    def __init__(self, keys: int, dim: int, seed: int):
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(keys, dim, generator=torch.Generator().manual_seed(seed)), dim=1))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor):
        """Overwrites the oldest rows by keys [n,d], raw or unit, in their order; no host sync.

        keys must be the gathered keys of all ranks, so that the queues stay equal.  Raises ValueError when n exceeds the queue."""
        if len(keys) > len(self.rows):
            raise ValueError(f"{len(keys)} keys do not fit a queue of {len(self.rows)}: enlarge method.queue")
        at = (self.ptr + torch.arange(len(keys), device=self.ptr.device)) % len(self.rows)
        self.rows.index_copy_(0, at, F.normalize(keys.to(self.rows.dtype), dim=1))
        self.ptr.add_(len(keys)).remainder_(len(self.rows))
