"""What the losses refuse.  Each check raises a ValueError of one sentence that begins with the
loss's name."""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Queues whose rows were found to be unit rows; `enqueue` keeps them so.
_checked = WeakIdKeyDictionary()


def positive(loss: str, temps: dict[str, float]) -> None:
    """Refuses temperatures, given by name, that are not above 0."""
    for name, temp in temps.items():
        # Written so that nan fails, too.
        if not temp > 0:
            raise ValueError(f"{loss}: {name} is {temp} and must be positive")


def targets(loss: str, inputs: dict[str, Tensor | None]) -> None:
    """Refuses targets, given by name, that require grad; None is passed over."""
    for name, x in inputs.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"{loss}: {name} requires grad but is a target; detach it")


def of_queue(
    loss: str, z: Tensor, queue: Tensor, temps: dict[str, float], inputs: dict[str, Tensor | None]
) -> None:
    """All checks of a loss over a queue.

    z       [...,d] the student's rows
    queue   [K,d]
    inputs  the targets by name, the queue among them"""
    positive(loss, temps)
    if queue.ndim != 2 or not len(queue) or queue.shape[1] != z.shape[-1] or not z.numel():
        raise ValueError(
            f"{loss}: rows {list(z.shape)} need a queue [K,d] as wide, neither empty; it is "
            f"{list(queue.shape)}"
        )
    targets(loss, inputs)
    for name, x in inputs.items():
        if x is not None and x.device != z.device:
            raise ValueError(
                f"{loss}: {name} is on {x.device} and the student's rows on {z.device}; move it "
                "there"
            )
    if not queue.is_contiguous():
        raise ValueError(
            f"{loss}: queue has strides {queue.stride()} and must be contiguous; a copy each step "
            "would cost what the op saves"
        )
    if not torch.compiler.is_compiling():
        _unit_rows(loss, queue)


def _unit_rows(loss: str, queue: Tensor) -> None:
    """Refuses a queue that was never normalised.

    Looks once at each tensor, since on a GPU the host must wait for the answer."""
    if queue in _checked or (queue.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    worst = max((part.float().norm(dim=1) - 1).abs().max().item() for part in queue.split(1 << 16))
    # Rounding to bfloat16 changes a length by less than 0.004.
    if not worst < 0.02:
        raise ValueError(
            f"{loss}: queue holds a row whose length is off by {worst:.2g} from 1; fill it with "
            "F.normalize(rows, dim=1) or `enqueue`"
        )
    _checked[queue] = True
