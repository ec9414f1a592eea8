"""How the sweep of the queue is launched on each architecture.

The table is static: no step is spent on tuning, and the same run gives the same bits.
`python bench/tune.py` times candidates on the GPU at hand and rewrites its rows in launch.json.  A
row that no GPU has timed says `timed: false`."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

FILE = Path(__file__).with_name("launch.json")
FEW = 64  # up to so many rows, a block of 64 rows is enough
# The oldest compute capability whose registers hold the sweep: on Turing (7.5) it spills 6 to 7 kB
# a thread.
OLDEST = (8, 0)


class Launch(NamedTuple):
    """A row of the table."""

    rows: int  # of the student in a block
    keys: int  # of the queue in a tile
    warps: int
    stages: int  # tiles in flight
    ctas: int  # blocks at once on a multiprocessor; decides how finely the queue is split
    tma: bool  # tiles come by the bulk copy engine (TMA), else by asynchronous copies
    registers: int | None  # cap per thread, so that `ctas` blocks fit
    timed: bool

    def options(self, even: bool) -> dict[str, int]:
        """Options of the kernel's launch.  even: every tile of the queue is full."""
        options = dict(num_warps=self.warps, num_stages=self.stages)
        # Masking the queue's last tile takes more registers than a cap would leave.
        if self.registers and even:
            options["maxnreg"] = self.registers
        return options


def choose(device: torch.device, dtype: torch.dtype, d: int, n: int, running: bool) -> Launch:
    """The table's row for a sweep.

    dtype    of the queue
    d, n     width and number of the rows that meet the queue
    running  whether the maximum is a running one"""
    # Triton's interpreter, on a CPU, takes sm_80's rows.
    arch = architecture(torch.cuda.get_device_capability(device)) if device.type == "cuda" else 80
    how = table()[key(arch, dtype, d, n, running)]
    # The copy engine takes rows of a multiple of 16 bytes, and the kernel's tile must not be wider.
    copyable = d == padded(d) and d * dtype.itemsize % 16 == 0
    return how if copyable or not how.tma else how._replace(tma=False)


def sweeps(device: torch.device) -> bool:
    """Whether a GPU is one for the Triton sweep; an older one takes chunked torch, and wants its
    queue in float32."""
    return torch.cuda.get_device_capability(device) >= OLDEST


def key(arch: int, dtype: torch.dtype, d: int, n: int, running: bool) -> str:
    """The row's name in launch.json, for example `sm_90 16-bit d128 many fixed`."""
    rows, maximum = "few" if n <= FEW else "many", "running" if running else "fixed"
    return f"sm_{arch} {8 * dtype.itemsize}-bit d{padded(d, 64)} {rows} {maximum}"


def architecture(capability: tuple[int, int]) -> int:
    """Whose rows a GPU takes: its own, else sm_80's, which need the least of a chip."""
    return {(9, 0): 90, (10, 0): 100, (10, 3): 100}.get(capability, 80)


def padded(d: int, least: int = 16) -> int:
    """The power of two that a row of width d is padded to; tensor cores need at least 16."""
    return max(least, 1 << (d - 1).bit_length())


@functools.cache
def table() -> dict[str, Launch]:
    """launch.json."""
    return {name: Launch(**row) for name, row in json.loads(FILE.read_text()).items()}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many of them a GPU has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    # Triton's interpreter: enough for several ranges of the queue.
    return 3
