"""Communication between ranks, and MoCo's batch shuffle.

Everything works the same with one rank, where nothing is sent.  Shapes: B images on each rank."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as td
from torch import Tensor

from fastdisco.common import files
from fastdisco.common.errors import UserError
from fastdisco.common.launch import defaults, local_rank, rank, world
from fastdisco.common.seeding import mix

__all__ = [
    "Shuffle",
    "alike",
    "all_gather",
    "all_gather_async",
    "all_mean",
    "all_min",
    "all_sum",
    "all_texts",
    "any_rank",
    "any_rank_later",
    "barrier",
    "defaults",
    "device",
    "local_rank",
    "mix",
    "rank",
    "world",
]

T = TypeVar("T")
# torch 2.14 renamed it.
_GATHER = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def all_gather(x: Tensor) -> Tensor:
    """[B,...] of each rank -> [B*ranks,...] in rank order, the same on every rank; no gradient."""
    return all_gather_async(x)()


def all_gather_async(x: Tensor) -> Callable[[], Tensor]:
    """Starts an `all_gather` and returns at once.

    Calling the result waits for the rows and returns them.  On a GPU it makes the current stream
    wait, not the host."""
    if world() == 1:
        return lambda: x
    x = x.contiguous()
    out = x.new_empty(world() * len(x), *x.shape[1:])
    work = _GATHER(out, x, async_op=True)
    # None is for processes outside the group, and every rank is in it.
    assert work is not None

    def rows() -> Tensor:
        work.wait()
        return out

    return rows


def all_mean(x: Tensor) -> Tensor:
    """Mean over ranks.  With several ranks it is computed in place."""
    return all_sum(x).div_(world())


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks.  With several ranks it is computed in place."""
    if world() > 1:
        td.all_reduce(x)
    return x


def all_min(n: int) -> int:
    """The smallest of the ranks' numbers.  The host waits for all ranks."""
    x = torch.tensor(n, device=device())
    if world() > 1:
        td.all_reduce(x, op=td.ReduceOp.MIN)
    return int(x)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank.  The host waits for all ranks."""
    x = torch.tensor(float(flag), device=device())
    if world() > 1:
        td.all_reduce(x, op=td.ReduceOp.MAX)
    return bool(x.item())


def any_rank_later(flag: bool) -> Callable[[], bool]:
    """Starts an `any_rank` between the hosts, which no device takes part in, and returns at once.

    Calling the result waits for all ranks to have started it."""
    if world() == 1:
        return lambda: flag
    x = torch.tensor(float(flag))
    work = td.all_reduce(x, op=td.ReduceOp.MAX, group=_hosts(), async_op=True)
    assert work is not None

    def found() -> bool:
        work.wait()
        return bool(x.item())

    return found


def all_texts(text: str) -> list[str]:
    """Every rank's text, in rank order.  It may hold names of files that are not valid UTF-8."""
    if world() == 1:
        return [text]
    raw = text.encode(errors="surrogateescape")
    own = torch.tensor(list(raw), dtype=torch.uint8, device=device())
    sizes = all_gather(torch.tensor([len(own)], device=device())).tolist()
    # A gather takes as many bytes from each rank: the longest text's, and one where all are empty.
    padded = own.new_zeros(max(1, *sizes))
    padded[: len(own)] = own
    rows = all_gather(padded).view(world(), -1).cpu()
    raws = (bytes(row[:n].tolist()) for row, n in zip(rows, sizes))
    return [x.decode(errors="surrogateescape") for x in raws]


def alike(action: Callable[..., T], *args: Any) -> T:
    """The action's result.  Where it raises a UserError or an error of the file system on any rank,
    every rank raises the first of them as a UserError: nobody is left waiting in what comes next.

    The action itself must not wait for other ranks."""
    found, error = None, ""
    try:
        with files.refused():
            found = action(*args)
    except UserError as e:
        error = str(e)
    if error := next(filter(None, all_texts(error)), ""):
        raise UserError(error)
    return cast(T, found)


def barrier() -> None:
    """Waits until every rank has come here."""
    if world() > 1:
        td.barrier()


class Shuffle:
    """A permutation of the global batch that every rank draws from the same seed: `split` gives a
    rank its share of the permuted batch, `join` brings the rows back into the original order.

    MoCo, arXiv:1911.05722, section 3.3: if a key were normalised together with the queries that it
    answers, the batch statistics would reveal which key belongs to which query."""

    def __init__(self, batch: int, seed: int) -> None:
        """batch  images on each rank."""
        g = torch.Generator().manual_seed(seed)
        order = torch.randperm(batch * world(), generator=g)
        self.mine = order[rank() * batch :][:batch]
        self.undo = torch.argsort(order)

    def split(self, x: Tensor) -> Tensor:
        """[B,C,...] -> [B,C,...], this rank's share of the permuted global batch.

        Images stay channels_last."""
        # With channels last the gathered rows already lie as channels_last images do, so that
        # neither movedim copies anything.
        rows = all_gather(x.movedim(1, -1))
        return rows[_on(x.device, self.mine)].movedim(-1, 1)

    def join(self, x: Tensor) -> Callable[[], Tensor]:
        """[B,...] of a shuffled share -> a function that waits for the other ranks and returns
        [B*ranks,...], the whole global batch in its original order, the same on every rank."""
        rows, undo = all_gather_async(x), _on(x.device, self.undo)
        return lambda: rows()[undo]


@functools.cache
def _hosts() -> td.ProcessGroup | None:
    """A group of all ranks that sends from host to host; None: the default group does."""
    if td.get_backend() != "nccl":
        return None
    group = td.new_group(backend="gloo")
    # A number is for processes outside the group, and every rank is in it.
    assert isinstance(group, td.ProcessGroup)
    return group


def _on(device: torch.device, x: Tensor) -> Tensor:
    # From pageable memory the copy would make the host wait for the device.
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
