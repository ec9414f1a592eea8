"""How much the parts of bench/evals.py are measured on, and the clocks."""

import time
from collections.abc import Callable
from typing import NamedTuple

# The student with the widest features for its cost first: its row is the one with the name.
STUDENTS = ("mobilenetv3_large_100", "resnet18")
# A round of an arm: seconds of the clock, and of the process on all cores.
Times = tuple[float, float]


class Sizes(NamedTuple):
    """What the parts are measured on; tests take smaller ones."""

    heads: int = 64
    linear_images: int = 512
    linear_classes: int = 1000
    students: tuple[str, ...] = STUDENTS
    bank: int = 50_000
    queries: int = 10_000
    width: int = 512
    penalties: int = 20
    all_train: int = 1000
    all_val: int = 250
    all_classes: int = 100
    pixels: int = 224


FULL = Sizes()


def timed(run: Callable[[], object]) -> Times:
    """Seconds of one call: of the clock, and of the process on all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu
