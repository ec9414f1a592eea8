"""How the sweep of the queue is launched on each architecture: a static table, so no step is spent
on tuning and the same run gives the same bits.

`bench/tune.py` measures on the GPU at hand and rewrites its rows in launch.json; a row that no GPU
has timed says `timed: false`."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

FILE = Path(__file__).with_name("launch.json")
FEW = 64  # rows for which a block of 64 is enough


class Launch(NamedTuple):
    rows: int  # of the student in a block
    keys: int  # of the queue in a tile
    warps: int
    stages: int  # tiles in flight
    ctas: int  # blocks at once on a multiprocessor: how finely the queue is split
    tma: bool  # tiles by the bulk copy engine, else by asynchronous copies
    registers: int | None  # a thread's at most, so that `ctas` fit
    timed: bool

    def options(self, even: bool) -> dict:
        """Of the launch.  A sweep that must look for the queue's end needs more registers than a
        cap would leave it."""
        return dict(num_warps=self.warps, num_stages=self.stages) | (
            {"maxnreg": self.registers} if self.registers and even else {}
        )


def choose(device: torch.device, dtype: torch.dtype, d: int, n: int, running: bool) -> Launch:
    """The table's row for n rows of width d against a queue of that dtype, with the running maximum
    or not."""
    # The interpreter.
    arch = architecture(torch.cuda.get_device_capability(device)) if device.type == "cuda" else 80
    how = table()[key(arch, dtype, d, n, running)]
    whole = d == padded(d) and d * dtype.itemsize % 16 == 0  # what the copy engine asks for
    return how if whole or not how.tma else how._replace(tma=False)


def key(arch: int, dtype: torch.dtype, d: int, n: int, running: bool) -> str:
    return f"sm_{arch} {8 * dtype.itemsize}-bit d{padded(d, 64)} {'few' if n <= FEW else 'many'} {'running' if running else 'fixed'}"


def architecture(capability: tuple[int, int]) -> int:
    """Whose rows a GPU takes: its own, else sm_80's, which need the least of a chip."""
    return {(9, 0): 90, (10, 0): 100, (10, 3): 100}.get(capability, 80)


def padded(d: int, least: int = 16) -> int:
    """The power of two that a row of width d fills; the tensor cores want 16."""
    return max(least, 1 << (d - 1).bit_length())


@functools.cache
def table() -> dict[str, Launch]:
    return {name: Launch(**row) for name, row in json.loads(FILE.read_text()).items()}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    # The interpreter: several ranges.
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 3
    )
