"""The rows of bench/kernels.py, from what it found."""

import itertools
import operator
import statistics
from collections.abc import Callable

from harness import row

from losses.contenders import OURS

# Why a number is missing where nothing else says so.
LATE = "the time was up"
NOT_ASKED = "not asked for (--only)"
# (what was found, loss) -> the row's value; raises Missing where there is none.
Number = Callable[[dict, str], float]


class Missing(Exception):
    """Why a number is not there."""


def summary(found: dict, gpu: bool) -> list[dict]:
    """The rows of both losses; one without a number says why."""
    out = []
    for loss, (what, (aim, better, unit, number)) in itertools.product(OURS, ROWS.items()):
        value = reason = None
        try:
            value = number(found, loss)
        except Missing as e:
            left = str(e) == NOT_ASKED
            reason = str(e) if gpu or left or what.startswith("cpu") else "no GPU in this machine"
        out.append(row(f"{loss}_{what}", value, unit, aim, better, reason))
    return out


def at(found: dict, loss: str, b: int) -> dict:
    """What was found at B=b, K=65536, d=128."""
    for one in found["shapes"]:
        if one["loss"] == loss and one["shape"] == [b, 65536, 128]:
            return one
    raise Missing(NOT_ASKED if found.get("only") == "cpu" else LATE)


def got(one: dict, name: str, key: str) -> float:
    """A contender's number at a shape."""
    result = one["contenders"].get(name, {})
    if key not in result:
        raise Missing(f"{name}: {'oom' if 'oom' in result else result.get('failed', LATE)}")
    return result[key]


def versus(*names: str, key: str = "graph_us") -> Number:
    """The best of these contenders over ours, at B=1024."""

    def number(found: dict, loss: str) -> float:
        one = at(found, loss, 1024)
        there = [n for n in names if key in one["contenders"].get(n, {})] or names[:1]
        return min(got(one, n, key) for n in there) / got(one, "ours", key)

    return number


def over_floor(b: int) -> Number:
    """Our time over the longest of the floors."""

    def number(found: dict, loss: str) -> float:
        one = at(found, loss, b)
        return got(one, "ours", "graph_us") / max(one["floors_us"].values())

    return number


def cpu(key: str, ratio: Callable) -> Number:
    """ratio(plain's, ours) on the CPU."""

    def number(found: dict, loss: str) -> float:
        if loss not in found["cpu"]:
            raise Missing(NOT_ASKED if found.get("only") == "gpu" else LATE)
        return ratio(*(found["cpu"][loss][name][key] for name in ("plain", "ours")))

    return number


def median_of_ratios(a: list[float], b: list[float]) -> float:
    return statistics.median(map(operator.truediv, a, b))


# Row -> aim, what is better, unit, value; SEED has MoCo's aims.
ROWS: dict[str, tuple[float, str, str, Number]] = {
    "cpu_speedup_b256": (
        2,
        "higher",
        "x plain torch's speed, on the CPU",
        cpu("times_s", median_of_ratios),
    ),
    "cpu_memory_ratio_b256": (
        10,
        "higher",
        "x less memory than plain torch, on the CPU",
        cpu("memory_bytes", operator.truediv),
    ),
    "over_floor_b1024": (2, "lower", "x the time of the binding floor", over_floor(1024)),
    "over_floor_b256": (3, "lower", "x the time of the binding floor", over_floor(256)),
    "vs_eager_b1024": (10, "higher", "x the speed of eager fp32", versus("eager fp32")),
    "vs_compile_fp32_b1024": (
        4,
        "higher",
        "x the speed of torch.compile fp32",
        versus("compile fp32"),
    ),
    "vs_compile_bf16_b1024": (
        2,
        "higher",
        "x the speed of torch.compile bf16",
        versus("compile bf16"),
    ),
    "vs_sdpa_b1024": (
        1.3,
        "higher",
        "x the speed of flash SDPA, the faster form",
        versus("sdpa", "sdpa split"),
    ),
    "memory_ratio_b1024": (
        50,
        "higher",
        "x less memory than eager fp32",
        versus("eager fp32", key="memory_bytes"),
    ),
}
