"""The queue of past keys, which are MoCo's negatives (arXiv:1911.05722, section 3.1).

It is a ring in buffers, the same on every rank.  Shapes: K rows, d embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdisco import kernels


class Queue(nn.Module):
    """K unit rows of which the oldest are overwritten first."""

    # [K,d], of length 1 up to the rounding of their dtype.
    rows: Tensor
    # [] int64, the row that the next key overwrites, which is the oldest.
    ptr: Tensor

    def __init__(self, size: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        """size  K
        seed  of the random directions that the rows start with, the same on every rank"""
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        rows = F.normalize(torch.randn(size, dim, generator=g), dim=1)
        self.register_buffer("rows", rows.to(dtype))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64))

    def enqueue(self, keys: Tensor) -> None:
        """Writes the keys [n,d], raw rows in any dtype, over the n oldest rows, in order.

        The rows are written in place and keep their address.  Call it after every loss that reads
        the old rows; backwards of the losses in kernels/ do not read them.  Raises ValueError for
        more keys than rows."""
        kernels.enqueue(self.rows, self.ptr, keys)
