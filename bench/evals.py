"""What the evaluations cost: time and memory beside one pass of the backbone.

    python bench/evals.py [--rounds 5] [--cores 2] [--only linear knn ridge all]
        parts that were measured at the same commit on the same machine are kept

- linear  an epoch of linear evaluation by DisCo's protocol with 64 learning rates at once, over the
          same with one: photographs, random crops of 224 px, the frozen backbone, 1000 classes, and
          as many validation images to training images as ImageNet has
- knn     10,000 queries among 50,000 images, 512 features, 1000 classes, six k from 1 to 200
- ridge   50,000 images, 512 features, 100 classes, 20 penalties, measured on 10,000
- all     the command `fastdisco eval all --only knn,retrieve,health,probe`, started in this process,
          over a bare pass of the same backbone over the same images: 1250 photographs of 100
          classes at 224 px
Arms of a part run in interleaved rounds, and a ratio is of one round.  Rows named cpu_time are of the
process's own time on all cores: another load on the machine shows there less than on the clock.
Writes bench/results/evals-cpu.json."""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from costs import backbone, cached
from costs.sizes import FULL, Sizes, Times
from harness import finish, parser, row, row_of_rounds
from harness.results import earlier

PARTS: dict[str, Callable[[Path, Sizes, int], Any]] = {
    "linear": backbone.linear,
    "knn": cached.knn,
    "ridge": cached.ridge,
    "all": backbone.whole,
}


def main(argv: Sequence[str] | None = None, sizes: Sizes = FULL) -> list[dict]:
    args = arguments(argv)
    # What is imported below makes its threads by it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    import torch

    torch.set_num_threads(args.cores)
    samples = earlier("evals", "cpu", args.out)
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            samples[part] = PARTS[part](Path(folder) / part, sizes, args.rounds)
    rows = summary(samples, sizes)
    finish("evals", "cpu", rows, samples, args.out, sizes=sizes._asdict())
    return rows


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--cores", type=int, default=2)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--out", type=Path, help="folder of the result, if not bench/results")
    return options.parse_args(argv)


def summary(samples: dict[str, Any], sizes: Sizes) -> list[dict]:
    """The rows; of a part that was not measured, without a value."""
    rows, at = [], f"{sizes.pixels} px"
    for i, arch in enumerate(sizes.students):
        times = samples.get("linear", {}).get(arch, {})
        arms = times.get(str(sizes.heads), []), times.get("1", [])
        what = f"time of {sizes.heads} heads over that of 1, {arch} at {at}"
        rows += _ratio("linear_64_heads_cost" + f"_{arch}" * (i > 0), *arms, what, 1.15)
    searched, solved = samples.get("knn", {}), samples.get("ridge", {})
    what = f"{sizes.queries} queries among {sizes.bank}, {sizes.width} features"
    rows += _seconds("knn_50k", searched.get("times", []), what, 60)
    gib, unit = searched.get("gib"), "GiB at the peak, beside the features themselves"
    value = None if gib is None else round(gib, 3)
    rows.append(row("knn_50k_gib", value, unit, 2, "lower", None if searched else "not run"))
    what = f"{sizes.bank} images, {sizes.width} features, {sizes.penalties} penalties"
    rows += _seconds("ridge_50k", solved.get("times", []), what, 10)
    both = samples.get("all", {})
    arms = both.get("all", []), both.get("pass", [])
    what = f"time of {backbone.CACHED.replace(',', ', ')} over one bare pass, {sizes.students[0]} at {at}"
    return rows + _ratio("eval_all_over_one_pass", *arms, what, 1.3)


def _ratio(name: str, first: list[Times], second: list[Times], unit: str, aim: float) -> list[dict]:
    """By the clock and, without an aim, by the process's own time."""
    named = {name: (0, aim), f"{name}_cpu_time": (1, None)}
    if not first:
        return [row(n, None, unit, a, "lower", "not run") for n, (_, a) in named.items()]
    ratios = lambda clock: [a[clock] / b[clock] for a, b in zip(first, second)]
    return [row_of_rounds(n, ratios(i), 3, unit, a, "lower") for n, (i, a) in named.items()]


def _seconds(name: str, times: list[Times], what: str, aim: float) -> list[dict]:
    """The fastest round, for whatever else runs on a machine only adds; and the median of the
    process's own time."""
    unit, cpu = f"s, {what}; the fastest round", f"s on all cores together, {what}; median"
    names = f"{name}_seconds", f"{name}_cpu_time"
    if not times:
        reason = "not run"
        units = (names[0], unit, aim), (names[1], cpu, None)
        return [row(n, None, u, a, "lower", reason) for n, u, a in units]
    walls, own = zip(*times)
    return [
        row(names[0], round(min(walls), 2), unit, aim, "lower"),
        row(names[1], round(statistics.median(own), 2), cpu, None, "lower"),
    ]


if __name__ == "__main__":
    main()
