"""An axis: from values to places in a drawing, and its ticks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    low: float
    high: float
    start: float  # place of `low` in the drawing
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value, to a tenth of a pixel."""
        low, high, x = self.low, self.high, value
        if self.log:
            low, high, x = math.log(low), math.log(high), math.log(x)
        return round(self.start + (x - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """(place, text) at 1, 2 and 5 times powers of ten."""
        found = _decades(self.low, self.high) if self.log else _even(self.low, self.high)
        return [(self.at(v), f"{v:.10g}") for v in found]


def around(values: Sequence[float], start: float, end: float, log: bool = False) -> Scale:
    """A scale with the values inside and some room beside them.

    log: only where the values span more than a factor of 5; they must be above 0 then"""
    low, high = min(values), max(values)
    if log and low > 0 and high > 5 * low:
        return Scale(low / 1.3, high * 1.3, start, end, log=True)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - room, high + room, start, end)


def _even(low: float, high: float, about: int = 6) -> list[float]:
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    inside = [v for v in found if low <= v <= high]
    # At 1 alone where there are too many.
    return inside if len(inside) <= 7 else [v for v in inside if f"{v:e}"[0] == "1"]
