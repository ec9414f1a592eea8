"""What the losses refuse, with a sentence."""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


def positive(loss: str, temps: dict[str, float]):
    for name, temp in temps.items():
        if not temp > 0:  # nor nan
            raise ValueError(f"{loss}: {name} is {temp} and must be positive")


def targets(loss: str, inputs: dict[str, Tensor | None]):
    for name, x in inputs.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"{loss}: {name} requires grad but is a target; detach it")


def of_queue(
    loss: str, z: Tensor, queue: Tensor, temps: dict[str, float], inputs: dict[str, Tensor | None]
):
    """inputs: the targets, among them the queue."""
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


# Queues whose rows were found to be unit rows; `enqueue` keeps them so.
_seen = WeakIdKeyDictionary()


def _unit_rows(loss: str, queue: Tensor):
    """Raises ValueError for a queue that was never normalised.  Once per tensor: on a GPU the
    answer has to be waited for."""
    if queue in _seen or (queue.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    worst = max((part.float().norm(dim=1) - 1).abs().max().item() for part in queue.split(1 << 16))
    if not worst < 0.02:  # bfloat16 rounds a length by less than 0.004
        raise ValueError(
            f"{loss}: queue holds a row whose length is off by {worst:.2g} from 1; fill it with "
            "F.normalize(rows, dim=1) or `enqueue`"
        )
    _seen[queue] = True
