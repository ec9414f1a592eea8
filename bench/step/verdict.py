"""What bounds a run, what to change, and what would bound it next."""

import math
from typing import NamedTuple

# The parts of a step, in the order of the picture's bar.
PARTS = ("teacher", "student", "ema", "loss", "exchange", "optimizer")
REMEDY = {
    "loader": "give it more CPU threads (data.threads) or cores, decode on a GPU, or pack the "
    "images smaller (fastdisco data pack)",
    "exchange": "take larger batches a rank, accumulate micro batches (data.accumulate), or a "
    "faster network between the ranks",
    "teacher": "record its embeddings once and replay them (teacher.cache), or lower its precision",
    "student": "lower the precision (engine.precision=bf16), compile it, or take a smaller student "
    "or view.size",
    "ema": "lower the precision (engine.precision=bf16)",
    "loss": "take a shorter queue (method.queue)",
    "optimizer": "take a simpler optimizer (optim.name=sgd)",
}


class Verdict(NamedTuple):
    """What bounds a run.

    bound    loader, compute or exchange
    share    of the bound's rate that the whole step reaches
    part     what to change: the bound, or the largest part of the compute
    ceiling  what bounds next, and its rate in images/s
    text     all that in sentences"""

    bound: str
    share: float
    part: str
    ceiling: tuple[str, float]
    text: str


def verdict(rates: dict[str, float], parts: dict[str, float], full: float) -> Verdict:
    """What bounds a run, what to change, and what would bound it next.

    rates  images/s of each resource alone: loader, compute and, with several ranks, exchange
    parts  seconds of each part of the compute
    full   images/s of the whole step"""
    bound, *others = sorted(rates, key=rates.get)
    share = full / rates[bound]
    text = (
        f"The {bound} bounds this run: alone it gives {rates[bound]:.0f} images/s, and the whole "
        f"step reaches {share:.0%} of that."
    )
    if share < 0.9:
        text += (
            " The rest is lost where loader, compute and exchange share cores or wait for each "
            "other."
        )
    next_bounds = {r: rates[r] for r in others}
    if bound == "compute":
        part, total = max(parts, key=parts.get), sum(parts.values())
        text += f" The {part} takes {parts[part] / total:.0%} of the compute: {REMEDY[part]}."
        rest = total - parts[part]
        without = rates[bound] * total / rest if rest > 0 else math.inf
        name = "without it" if part == "teacher" else f"with the {part} at no cost"
        next_bounds = {f"compute {name}": without} | next_bounds
    else:
        part = bound
        text += f" To go faster, {REMEDY[bound]}."
    ceiling = min(next_bounds.items(), key=lambda x: x[1])
    if math.isfinite(ceiling[1]):
        text += f" The next ceiling is {ceiling[0]}, at {ceiling[1]:.0f} images/s."
    return Verdict(bound, share, part, ceiling, text)
