"""Evaluations of features that are there already: nearest neighbours and ridge regression."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from costs.sizes import Sizes, Times, timed


def knn(folder: Path, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Times, and GiB at the peak above what the features themselves take, in a fresh process."""
    search = searched(sizes)
    times = [timed(search) for _ in range(rounds)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return dict(times=times, gib=pool.submit(peak_gib, sizes).result())


def searched(sizes: Sizes) -> Callable[[], object]:
    from fastdisco.evals import neighbours

    bank, queries = (
        features(n, sizes.width, sizes.linear_classes, seed)
        for seed, n in enumerate((sizes.bank, sizes.queries))
    )
    return lambda: neighbours.run(bank, queries, sizes.linear_classes)


def peak_gib(sizes: Sizes) -> float:
    """What a search adds to this process's memory at its peak."""
    few = sizes._replace(bank=256, queries=256)
    # What the first product allocates for good is not the search's.
    searched(few)()
    search = searched(sizes)
    before = memory("VmRSS")
    search()
    return (memory("VmHWM") - before) / 2**20


def memory(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


def ridge(folder: Path, sizes: Sizes, rounds: int) -> dict[str, list[Times]]:
    import torch

    from fastdisco.evals import ridge as regression
    from fastdisco.evals.settings import STRENGTHS

    assert len(STRENGTHS) == sizes.penalties
    bank = features(sizes.bank, sizes.width, 100, 0)
    val = features(sizes.queries, sizes.width, 100, 1)
    held = bank.take(torch.arange(0, sizes.bank, 100))
    run = lambda: regression.run(bank, held, val, 100)
    return dict(times=[timed(run) for _ in range(rounds)])


def features(images: int, width: int, classes: int, seed: int) -> Any:
    """Like a network's: positive, of very different spread, with classes that overlap."""
    import torch

    from fastdisco.evals.features import Features

    shared, own = (torch.Generator().manual_seed(s) for s in (1000, seed))
    centres = torch.randn(classes, width, generator=shared)
    spread = torch.logspace(0, -2, width)
    label = torch.randint(classes, (images,), generator=own)
    x = torch.randn(images, width, generator=own).mul_(4).add_(centres[label])
    return Features(x.mul_(spread).add_(1).relu_(), label, torch.arange(images))
