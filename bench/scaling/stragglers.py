"""The slowest of n ranks, which all others wait for in every step."""

import math
from collections.abc import Callable
from statistics import NormalDist

# Points of the integral.
POINTS = 4000


def expected_max(quantile: Callable[[float], float], n: int) -> float:
    """The mean of the largest of n independent draws: the integral of quantile(v^(1/n)) over v in
    [0,1], for the largest of n lies below x with the n-th power of the probability of one.

    quantile  of one draw, for u in (0,1)"""
    inner = ((i + 0.5) / POINTS for i in range(POINTS))
    return sum(quantile(v ** (1 / n)) for v in inner) / POINTS


def normal(spread: float) -> Callable[[float], float]:
    """Steps of mean 1 whose standard deviation is `spread`."""
    return NormalDist(1, spread).inv_cdf if spread else lambda u: 1.0


def empirical(samples: list[float]) -> Callable[[float], float]:
    """Steps as they were measured, over their mean."""
    known, mean = sorted(samples), math.fsum(samples) / len(samples)
    return lambda u: known[min(int(u * len(known)), len(known) - 1)] / mean
