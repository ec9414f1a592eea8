"""The queue of past keys, MoCo's negatives (arXiv:1911.05722, section 3.1): a ring in buffers, the
same on every rank."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdisco import kernels


class Queue(nn.Module):
    rows: Tensor  # [K,d] unit rows, as far as their dtype goes
    ptr: Tensor  # [] int64, the row that the next key overwrites: the oldest

    def __init__(self, size: int, dim: int, seed: int, dtype: torch.dtype = torch.float32):
        """size: K.  It starts with random directions, the same on every rank by the seed."""
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.register_buffer(
            "rows", F.normalize(torch.randn(size, dim, generator=g), dim=1).to(dtype)
        )
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64))

    def enqueue(self, keys: Tensor):
        """Writes the keys [n,d], raw rows in any dtype, over the n oldest, in order.

        In place, so that the rows keep their address, and after every loss that still had to read
        the old ones (those of kernels/ never do). Raises ValueError for more keys than rows."""
        kernels.enqueue(self.rows, self.ptr, keys)
