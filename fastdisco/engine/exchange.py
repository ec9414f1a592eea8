"""Gradients averaged over ranks while the backward that makes them still runs."""

from collections.abc import Callable

import torch
import torch.distributed as td
from torch import Tensor, nn

from fastdisco.common import dist

# In a bucket each tensor starts at a multiple of so many elements: the optimizer's kernels read 16
# bytes at a time only from such addresses.
ALIGN = 32


class Exchange:
    """Averages a network's gradients over ranks, bucket by bucket, during the backward of an
    optimizer step's last micro batch.

    A backward makes the last layer's gradients first, so buckets are filled from the last parameter
    to the first.  A bucket is sent once all its gradients are there and all buckets before it are
    sent.  So all ranks send the same buckets in the same order, in whatever order their gradients
    come.

    Nothing is copied back: afterwards the gradients are views into the buckets, laid out as the
    parameters are.

    A parameter without a gradient keeps none, so that the optimizer leaves it alone, as in plain
    PyTorch.  All ranks must agree on which parameters those are."""

    def __init__(self, net: nn.Module, bucket_bytes: int, last: Callable[[], bool]) -> None:
        """last  whether the current micro batch is the step's last
        The memory format of the gradients is that which the parameters have now."""
        parameters: list[Tensor] = list(net.parameters())
        trained = [p for p in reversed(parameters) if p.requires_grad] if dist.world() > 1 else []
        self.left_out = [p for p in parameters if not p.requires_grad]
        self.buckets = [_Bucket(part) for part in _parts(trained, bucket_bytes)]
        self.last = last
        # How many buckets of this step have been sent.
        self.sent = 0
        for bucket in self.buckets:
            # This hook runs once in a backward, also for a weight that several forwards used.
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))

    def finish(self) -> None:
        """Call it after each backward.  It sends what is left and lets the current stream, on a CPU
        the process, wait until all has arrived."""
        if not self.last():
            return
        assert all(p.grad is None for p in self.left_out), (
            "a parameter was frozen when the exchange was made"
        )
        while self.sent < len(self.buckets):
            self._send()
        for bucket in self.buckets:
            bucket.wait()
        self.sent = 0

    def _arrived(self, bucket: "_Bucket") -> None:
        if not self.last():
            return
        bucket.missing -= 1
        while self.sent < len(self.buckets) and not self.buckets[self.sent].missing:
            self._send()

    def _send(self) -> None:
        self.buckets[self.sent].send()
        self.sent += 1


class _Bucket:
    """Parameters whose gradients travel together, in one flat tensor."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        # How many of the gradients are not there yet.
        self.missing = len(parameters)
        self.work: td.Work | None = None
        starts, size = [], 0
        for p in parameters:
            starts.append(size)
            size += -(-p.numel() // ALIGN) * ALIGN
        self.flat = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)
        self.views = [
            # empty_like gives the strides of a dense tensor in p's memory format.
            self.flat.as_strided(p.shape, torch.empty_like(p, device="meta").stride(), at)
            for p, at in zip(parameters, starts)
        ]

    def send(self) -> None:
        """Copies the gradients into the bucket, makes them views of it, and starts their sum."""
        pairs = zip(self.parameters, self.views)
        here = [(p, p.grad, view) for p, view in pairs if p.grad is not None]
        if here:
            torch._foreach_copy_([view for _, _, view in here], [grad for _, grad, _ in here])
        for p, _, view in here:
            p.grad = view
        # Before the sum, as DistributedDataParallel does.
        self.flat.div_(dist.world())
        self.work = td.all_reduce(self.flat, async_op=True)

    def wait(self) -> None:
        """Waits for the sum; the bucket is then ready for the next step."""
        assert self.work is not None
        self.work.wait()
        self.missing = len(self.parameters)


def _parts(parameters: list[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Consecutive parameters of one dtype, in parts of at most `bucket_bytes`.  A larger parameter
    is a part by itself."""
    parts: list[list[Tensor]] = []
    size = 0
    for p in parameters:
        size += p.nbytes
        if not parts or size > bucket_bytes or p.dtype != parts[-1][0].dtype:
            parts.append([])
            size = p.nbytes
        parts[-1].append(p)
    return parts
