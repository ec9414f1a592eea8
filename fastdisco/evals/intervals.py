"""How far an accuracy can be trusted: bootstrap intervals over the validation images, and the
comparison of two networks on the same images."""

from typing import NamedTuple

import numpy as np

DRAWS = 10_000


class Interval(NamedTuple):
    low: float
    high: float


class Paired(NamedTuple):
    difference: float  # accuracy of the first less that of the second
    interval: Interval  # 95 %, of the difference
    p: float  # McNemar's exact, two-sided: that both are right equally often
    only_first: int  # images that only the first gets right
    only_second: int


def bootstrap(right: np.ndarray, seed: int = 0, level: float = 0.95) -> Interval:
    """The percentile interval of an accuracy.  right: [N] bool, one for each image.

    How many of N images drawn with replacement are right is binomial, so no image is drawn."""
    n = len(right)
    found = np.random.default_rng(seed).binomial(n, right.mean(), DRAWS) / n
    return _ends(found, level)


def paired(first: np.ndarray, second: np.ndarray, seed: int = 0, level: float = 0.95) -> Paired:
    """Two networks on the same images, [N] bool each in the same order.

    An image drawn with replacement is one that only the first, only the second, or both or neither
    get right: the counts are multinomial."""
    assert len(first) == len(second)
    n = len(first)
    a, b = int((first & ~second).sum()), int((second & ~first).sum())
    shares = [a / n, b / n, 1 - (a + b) / n]
    counts = np.random.default_rng(seed).multinomial(n, shares, DRAWS)
    found = (counts[:, 0] - counts[:, 1]) / n
    return Paired((a - b) / n, _ends(found, level), mcnemar(a, b), a, b)


def mcnemar(a: int, b: int) -> float:
    """Exact two-sided p: of a + b images on which two networks differ, how likely a split as uneven
    as this is where each is as likely to win."""
    from scipy.stats import binom

    return min(1.0, 2 * float(binom.cdf(min(a, b), a + b, 0.5))) if a + b else 1.0


def _ends(found: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
