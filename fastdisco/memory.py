"""The queue of past keys, MoCo's negatives (arXiv:1911.05722, section 3.1): a ring in buffers, the same on every rank."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Queue(nn.Module):
    rows: Tensor  # [K,d] unit rows
    ptr: Tensor  # [] int64, the row that the next key overwrites: the oldest

    def __init__(self, size: int, dim: int, seed: int):
        """size: K.  It starts with random directions, the same on every rank by the seed."""
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.register_buffer("rows", F.normalize(torch.randn(size, dim, generator=g), dim=1))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor):
        """Writes the keys [n,d], raw rows in any dtype, over the n oldest, in order.

        In place, so that the rows keep their address and no loss may still have to read the old ones (those of kernels/ do not).
        Raises ValueError for more keys than rows: which of them stay would be left to chance."""
        size, n = len(self.rows), len(keys)
        if n > size:
            raise ValueError(f"the queue holds {size} keys and cannot take {n} at once; enlarge method.queue or lower data.batch")
        where = (self.ptr + torch.arange(n, device=self.ptr.device)) % size  # the pointer stays on the device
        self.rows.index_copy_(0, where, F.normalize(keys.to(self.rows.dtype), dim=1))
        self.ptr.add_(n).remainder_(size)
