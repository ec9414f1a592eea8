"""Gradients that travel while the backward still runs: fastdisco/engine/exchange.py as a model."""

from collections.abc import Callable
from typing import NamedTuple


class Layer(NamedTuple):
    """A layer in the backward: seconds that it takes, and bytes of gradients that it makes."""

    seconds: float
    gradient: float


def buckets(layers: list[Layer], limit: float) -> list[tuple[float, float]]:
    """(seconds from the backward's start until it is full, bytes) of each bucket.

    layers  in the order of the backward: the network's last one first
    limit   bytes of a bucket; a larger gradient is a bucket by itself"""
    found: list[tuple[float, float]] = []
    now = ready = size = 0.0
    for layer in layers:
        if size and size + layer.gradient > limit:
            found.append((ready, size))
            size = 0.0
        now += layer.seconds
        size += layer.gradient
        # A bucket is sent with its last gradient, not with the next bucket's first.
        ready = now if layer.gradient else ready
    return [*found, (ready, size)] if size else found


def finished(full: list[tuple[float, float]], cost: Callable[[float], float]) -> float:
    """Seconds from the backward's start until the last bucket has arrived.  Buckets travel one
    after another, in their order.

    cost  seconds of a bucket of so many bytes"""
    end = 0.0
    for ready, size in full:
        end = max(end, ready) + cost(size)
    return end


def exposed(
    layers: list[Layer], limit: float, cost: Callable[[float], float], overlap: bool = True
) -> float:
    """Seconds that the exchange adds to the backward."""
    full = buckets(layers, limit)
    if not overlap:
        return sum(cost(size) for _, size in full)
    backward = sum(layer.seconds for layer in layers)
    return max(0.0, finished(full, cost) - backward)
