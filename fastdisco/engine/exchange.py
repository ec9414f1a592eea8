"""The ranks' exchange of gradients while the backward that makes them still runs."""

from collections.abc import Callable

import torch
import torch.distributed as td
from torch import Tensor, nn

from fastdisco.common import dist

# Elements; the optimizer's kernels read 16 bytes at a time only where each tensor starts at a
# multiple of them.
ALIGN = 32


class Exchange:
    """Averages a net's gradients over ranks, bucket by bucket, during the backward of an optimizer
    step's last micro batch.

    Gradients come from the last layer on, so buckets hold the parameters from the last on; one goes
    out as soon as its gradients are there and those before it are gone: all ranks send the same
    buckets in the same order, whatever order their gradients come in. What arrives is not copied
    back: gradients then are views into the buckets, laid out as the parameters are.
    A parameter without a gradient keeps none, so that the optimizer leaves it alone as with plain
    PyTorch; which ones those are must not depend on the rank."""

    def __init__(self, net: nn.Module, bucket_bytes: int, last: Callable[[], bool]):
        """last: whether this is the step's last micro batch.  Takes the parameters' memory format
        as it is now."""
        parameters = list(net.parameters())
        trained = [p for p in reversed(parameters) if p.requires_grad] if dist.world() > 1 else []
        self.left_out = [p for p in parameters if not p.requires_grad]
        self.buckets = [_Bucket(part) for part in _parts(trained, bucket_bytes)]
        self.last, self.sent = last, 0
        for bucket in self.buckets:
            # Runs once a backward, also for a weight that several forwards used.
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))

    def finish(self):
        """After each backward: sends what is left and lets the stream, on a CPU the process, wait
        for all of it."""
        if not self.last():
            return
        assert all(p.grad is None for p in self.left_out), (
            "a parameter was frozen when the exchange was made"
        )
        while self.sent < len(self.buckets):
            self._send()
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.missing = len(bucket.parameters)
        self.sent = 0

    def _arrived(self, bucket: "_Bucket"):
        if self.last():
            bucket.missing -= 1
            while self.sent < len(self.buckets) and not self.buckets[self.sent].missing:
                self._send()

    def _send(self):
        self.buckets[self.sent].send()
        self.sent += 1


class _Bucket:
    def __init__(self, parameters: list[Tensor]):
        self.parameters, self.missing = parameters, len(parameters)
        starts = [0]
        for p in parameters:
            starts.append(starts[-1] + -(-p.numel() // ALIGN) * ALIGN)
        self.flat = torch.zeros(
            starts.pop(), dtype=parameters[0].dtype, device=parameters[0].device
        )
        self.views = [
            self.flat.as_strided(p.shape, torch.empty_like(p, device="meta").stride(), at)
            for p, at in zip(parameters, starts)
        ]

    def send(self):
        here = [(p, view) for p, view in zip(self.parameters, self.views) if p.grad is not None]
        if here:
            torch._foreach_copy_([view for _, view in here], [p.grad for p, _ in here])
        for p, view in here:
            p.grad = view
        self.flat.div_(dist.world())  # before the sum, as DistributedDataParallel
        self.work = td.all_reduce(self.flat, async_op=True)


def _parts(parameters: list[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Consecutive parameters of one dtype, in parts of `bucket_bytes` or of one parameter that is
    larger."""
    parts, size = [], 0
    for p in parameters:
        size += p.nbytes
        if not parts or size > bucket_bytes or p.dtype != parts[-1][0].dtype:
            parts.append([])
            size = p.nbytes
        parts[-1].append(p)
    return parts
