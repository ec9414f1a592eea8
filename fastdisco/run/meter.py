"""What a run measures: the means of its scalars, and where the time goes."""

import math
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdisco.common import dist
from fastdisco.common.errors import UserError


def named(
    scalars: dict[str, Any], weights: Mapping[str, float] | None = None, student: str = ""
) -> dict[str, Any]:
    """Scalars under their full names, group/name as in TensorBoard.

    loss, lr ...        train/loss, train/lr
    a key of `weights`  a term of the loss: train/loss_<term>
    with a slash        has its group already: feat/std
    student             one of several: train/<student>/loss"""
    out = {}
    for name, value in scalars.items():
        if "/" not in name:
            name = f"train/loss_{name}" if weights and name in weights else f"train/{name}"
        group, _, rest = name.partition("/")
        out[f"{group}/{student}/{rest}" if student else f"{group}/{rest}"] = value
    return out


class Meter:
    """The scalars of all micro batches since the last `read`, which stay on the device until then,
    and where the time went."""

    def __init__(self, images: int, folder: Path, start: int) -> None:
        """images: per step, over all ranks; folder: the run's; start: the step the loop begins
        at."""
        self.images, self.folder = images, folder
        self.names: list[str] = []
        # Seconds that all saves have taken since now.
        self.since, self.stalled = time.perf_counter(), 0.0
        self._reset(start)

    def add(self, scalars: dict[str, Tensor]) -> None:
        """The named scalars of one micro batch; the host does not wait for them."""
        self.names = list(scalars)
        self.rows.append(torch.stack([v.detach().float() for v in scalars.values()]))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is no training, such as an evaluation: its time does not count."""
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save, for which the training stands still: that is no training either."""
        begin = time.perf_counter()
        with self.paused():
            yield
        self.stall += time.perf_counter() - begin

    def read(self, done: int, steps: int) -> dict[str, float]:
        """Means over micro batches and ranks since the last read, and the speed; here the loop
        waits for the device.  Called by every rank.

        done: steps so far, of `steps`.
        Raises UserError where a value is not finite, naming the step and the term."""
        table = dist.all_mean(torch.stack(self.rows)).tolist()
        took = time.perf_counter() - self.begin
        self._refuse_not_finite(table, done - self.last)
        columns = zip(self.names, zip(*table))
        means = {name: sum(column) / len(table) for name, column in columns}
        speed = self._speed(took, done - self.last, steps - done)
        saves = self._saves()
        self._reset(done)
        return means | speed | saves

    def _reset(self, done: int) -> None:
        self.rows: list[Tensor] = []
        self.waited, self.last, self.begin = 0.0, done, time.perf_counter()
        self.stall = 0.0

    def _refuse_not_finite(self, table: list[list[float]], n: int) -> None:
        """table: a row for each micro batch of the last n steps."""
        for i, row in enumerate(table):
            for name, value in zip(self.names, row):
                if not math.isfinite(value):
                    raise UserError(
                        f"step {self.last + 1 + i * n // len(table)}: {name} is {value}; the last "
                        f"checkpoint, in {self.folder / 'checkpoints'}, is from before it: lower "
                        "optim.lr or set optim.clip, then train on"
                    )

    def _speed(self, took: float, n: int, left: int) -> dict[str, float]:
        """took: seconds of the last n steps; left: steps to go."""
        return {
            # Images a second, and what they would be if data were always there.
            "perf/total_ips": n * self.images / took,
            "perf/compute_ips": n * self.images / max(took - self.waited, 1e-9),
            # Seconds of a step, and of its waiting for data.
            "perf/step_time": took / n,
            "perf/data_time": self.waited / n,
            "perf/data_share": self.waited / took,
            "perf/eta": took / n * left,
            "perf/mem_gb": _peak_bytes() / 1e9,
        }

    def _saves(self) -> dict[str, float]:
        """Seconds that the training has stood still for saves since the last read, and their share
        of its time so far."""
        self.stalled += self.stall
        share = {"perf/save_share": self.stalled / (time.perf_counter() - self.since)}
        return (share if self.stalled else {}) | (
            {"perf/save_stall": self.stall} if self.stall else {}
        )


def _peak_bytes() -> int:
    """The most memory of the run so far on this rank: of its GPU, or of the process."""
    if torch.cuda.is_available():
        # Reserved, not allocated: a graph's replay needs what it does not allocate anew.  The
        # buffers of DALI are not torch's and are not in it.
        return torch.cuda.max_memory_reserved()
    # Linux gives KiB.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
