"""Seconds of a step on n devices, in parts that add up."""

from collections.abc import Callable
from typing import NamedTuple

from scaling.devices import Device, Machine
from scaling.overlap import exposed
from scaling.stragglers import expected_max, normal
from scaling.work import Job


class Step(NamedTuple):
    """Seconds of an optimizer step, in which the ranks see `images` together.

    compute     networks, loss, update
    exchange    gradients, as far as the backward does not hide them
    gather      embeddings, keys and the method's own collectives
    shuffle     images of bn.shuffle: gather, as far as the teacher does not hide them
    stragglers  waiting for the slowest rank
    data        waiting for loader and storage
    checkpoint, evaluation  their share of a step"""

    images: float
    compute: float
    exchange: float
    gather: float
    shuffle: float
    stragglers: float
    data: float
    checkpoint: float
    evaluation: float

    @property
    def seconds(self) -> float:
        return sum(self[1:])

    @property
    def rate(self) -> float:
        """Images/s of all devices."""
        return self.images / self.seconds

    @property
    def largest(self) -> str:
        """The part, besides the compute, that takes most."""
        return max(self._fields[2:], key=lambda name: getattr(self, name))


def predict(
    job: Job,
    device: Device,
    machine: Machine,
    n: int,
    contention: float = 1.0,
    slowest: Callable[[int], float] | None = None,
) -> Step:
    """The step on n devices.

    contention  how much slower a device computes when n of them run on its host side by side
    slowest     of n ranks, the mean of the slowest one's step over the mean step; as the machine's
                spread says by default"""
    slowest = slowest or (lambda n: expected_max(normal(machine.spread), n))
    link, micro = machine.link, job.batch / n / job.accumulate
    parts = device.parts(job, micro)
    compute = contention * (job.accumulate * parts.compute + parts.optimizer)

    sent = [layer._replace(seconds=contention * layer.seconds) for layer in parts.backward]
    cost = lambda size: link.all_reduce(n, size)
    whole = exposed(sent, job.bucket, cost, overlap=False) if n > 1 else 0.0
    seen = exposed(sent, job.bucket, cost, job.overlap) if n > 1 else 0.0
    exchange = max(seen, machine.busy * whole)

    shuffle = keys = 0.0
    if n > 1:
        if job.images:
            images = link.all_gather(n, micro * job.images)
            # The teacher was started before, on a stream of its own.
            hidden = contention * parts.teacher if machine.graphs else 0.0
            shuffle = job.accumulate * max(0.0, images - hidden, machine.busy * images)
        if job.keys:
            keys = link.all_gather(n, micro * job.keys)
            # Without graphs the student's forward runs meanwhile.
            hidden = 0.0 if machine.graphs else contention * parts.forward
            keys = max(0.0, keys - hidden, machine.busy * keys)
        keys = job.accumulate * (keys + sum(link.all_gather(n, size) for size in job.small))

    straggle = (slowest(n) - 1) * compute
    busy = compute + exchange + keys + shuffle + straggle
    nodes = link.nodes(n)
    data = max(job.batch / (nodes * machine.loader), job.batch * machine.image / machine.read)
    save = job.saved / machine.write / job.every_save
    look = 0.0
    if job.every_eval:
        rate = min(_forwards(job, device, contention) * n, nodes * machine.loader)
        look = job.evaluated / rate / job.every_eval
    return Step(
        job.batch, compute, exchange, keys, shuffle, straggle, max(0.0, data - busy), save, look
    )


def _forwards(job: Job, device: Device, contention: float) -> float:
    """Images/s of the network that an evaluation runs: a view each, on one device, in batches of
    128."""
    parts = device.parts(job, 128)
    # The mean student sees one view; without it the student's forward has all views.
    return 128 / (contention * (parts.ema or parts.forward))
