"""The curve from 1 to 1,024 devices: where it stops paying, what stops it, what to change."""

from typing import NamedTuple

from scaling.devices import Device, Machine
from scaling.predict import Step, predict
from scaling.work import Job

COUNTS = [2**i for i in range(11)]
# Of n times the images/s of one device: with less, n devices do not pay.
PAYS = 0.5
# Fewer images on a rank are too few for its batch norms (docs/method.md).
FEWEST = 8

# What stops the curve -> what to change.
REMEDY = {
    "compute": "a larger data.batch: the devices have too few images each",
    "exchange": "a larger data.batch, or data.accumulate: fewer exchanges for each image",
    "gather": "a larger data.batch: fewer gathers for each image",
    "shuffle": "bn.shuffle=load: no image is sent",
    "stragglers": "a larger data.batch does not help here: look for the slow node (fastdisco doctor)",
    "data": "more CPU cores a node, packed smaller images (fastdisco data pack), or faster storage",
    "checkpoint": "a larger checkpoint.every",
    "evaluation": "a larger eval.every, or a smaller eval.bank",
    "batch": "a larger data.batch: fewer than 8 images are left for each device",
}


class Limit(NamedTuple):
    """The last count that pays, the step there, and what stops the next doubling; '': nothing up to
    the last count."""

    count: int
    step: Step
    reason: str


def curve(job: Job, device: Device, machine: Machine) -> dict[int, Step]:
    """Of each count that leaves every device at least FEWEST images a micro batch."""
    return {
        n: predict(job, device, machine, n)
        for n in COUNTS
        if job.batch // job.accumulate >= FEWEST * n
    }


def limit(steps: dict[int, Step]) -> Limit:
    """Where the curve stops paying.

    A node whose cores feed its GPUs too slowly lowers the curve once; more nodes have more cores."""
    one = steps[1].rate
    last = max(n for n, step in steps.items() if step.rate >= PAYS * n * one)
    if 2 * last in steps:
        return Limit(last, steps[last], grown(steps[last], steps[2 * last]))
    return Limit(last, steps[last], "" if last == COUNTS[-1] else "batch")


def grown(one: Step, two: Step) -> str:
    """The part that keeps the doubling from halving the step the most."""
    over = lambda part: getattr(two, part) - getattr(one, part) / 2
    return max(Step._fields[1:], key=over)


def remedies(job: Job) -> dict[str, Job]:
    """What a user may change, each by itself, and all together."""
    # Enough for FEWEST images on each of 1,024 devices.
    large = max(job.batch, FEWEST * COUNTS[-1])
    found = {
        "bn.shuffle=load": job._replace(images=0.0) if job.images else None,
        "teacher.cache=replay": job._replace(teacher=[]) if job.teacher else None,
        f"data.batch={large}": job._replace(batch=large),
        f"data.batch={large} data.accumulate=4": job._replace(batch=large, accumulate=4),
    }
    found = {name: changed for name, changed in found.items() if changed}
    return found | {"load, replay and the batch": job._replace(images=0.0, teacher=[], batch=large)}
