"""Ranks: start-up without a launcher, gathering, and the batch shuffle of MoCo.  Everything works
the same at one rank."""

from collections.abc import Callable

import torch
import torch.distributed as td
from torch import Tensor

from fastdisco.common.launch import defaults, local_rank, rank, world
from fastdisco.common.seeding import mix

__all__ = [
    "Shuffle",
    "all_gather",
    "all_gather_async",
    "all_mean",
    "all_min",
    "all_sum",
    "any_rank",
    "barrier",
    "defaults",
    "device",
    "local_rank",
    "mix",
    "rank",
    "world",
]

# Renamed in torch 2.14.
_GATHER = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor


def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def all_gather(x: Tensor) -> Tensor:
    """[B,...] of each rank -> [B*ranks,...] in rank order, the same on every rank; no gradient."""
    return all_gather_async(x)()


def all_gather_async(x: Tensor) -> Callable[[], Tensor]:
    """`all_gather` under way while the caller goes on: what is returned waits for the rows, on a
    GPU its current stream does."""
    if world() == 1:
        return lambda: x
    x = x.contiguous()
    out = x.new_empty(world() * len(x), *x.shape[1:])
    work = _GATHER(out, x, async_op=True)

    def rows():
        work.wait()
        return out

    return rows


def all_mean(x: Tensor) -> Tensor:
    """Mean over ranks, in place where there are several."""
    return all_sum(x).div_(world())


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks, in place where there are several."""
    if world() > 1:
        td.all_reduce(x)
    return x


def all_min(n: int) -> int:
    """The smallest of the ranks' numbers; waits for all."""
    x = torch.tensor(n, device=device())
    if world() > 1:
        td.all_reduce(x, op=td.ReduceOp.MIN)
    return int(x)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; waits for all."""
    x = torch.tensor(float(flag), device=device())
    if world() > 1:
        td.all_reduce(x, op=td.ReduceOp.MAX)
    return bool(x.item())


def barrier():
    if world() > 1:
        td.barrier()


class Shuffle:
    """A permutation of the global batch, the same on every rank, by a seed: `split` hands each rank
    its share, `join` undoes it.

    MoCo, arXiv:1911.05722, section 3.3: keys normalised beside the queries they answer would leak
    through the batch statistics."""

    def __init__(self, batch: int, seed: int):
        """batch: images on each rank."""
        g = torch.Generator().manual_seed(seed)
        order = torch.randperm(batch * world(), generator=g)
        self.mine = order[rank() * batch :][:batch]
        self.undo = torch.argsort(order)

    def split(self, x: Tensor) -> Tensor:
        """[B,C,...] -> [B,C,...]: this rank's share of the permuted global batch; images stay
        channels_last."""
        # As images lie in memory, so that nothing is rearranged.
        rows = all_gather(x.movedim(1, -1))
        return rows[_on(x.device, self.mine)].movedim(-1, 1)

    def join(self, x: Tensor) -> Callable[[], Tensor]:
        """[B,...] of a shuffled share -> [B*ranks,...], once called: the whole global batch in its
        own order, on every rank."""
        rows, undo = all_gather_async(x), _on(x.device, self.undo)
        return lambda: rows()[undo]


def _on(device: torch.device, x: Tensor) -> Tensor:
    # Pageable memory would make the host wait.
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
