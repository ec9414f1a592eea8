"""The CPU ranks that the model is compared with: real training steps of 1, 2 and 4 processes, and
the parts that the model needs, all in interleaved rounds.

Every process has one thread.  Four of them train alone, each its own world: one gives the parts of a
step; two or four side by side, which send each other nothing, tell what sharing the cores costs.
Two more are ranks of one training, and four of another."""

import contextlib
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from harness import interleaved

from scaling.devices import Machine, Measured
from scaling.links import Link, Steps
from scaling.predict import Step, predict
from scaling.stragglers import empirical, expected_max
from scaling.work import Job
from scaling.worker import serve

# Of a training -> how many ranks.
WORLDS = {"alone": 1, "two": 2, "four": 4}
# Processes that train alone, side by side.
BESIDE = (1, 2, 4)
PARTS = ("teacher", "student", "ema", "loss", "optimizer")
# Bytes of the all-reduces that tell the link's latency and its bandwidth.
SMALL, LARGE = 4, 8 * 2**20
# Seconds after an arm that loads.
PAUSE = 0.3
# Seconds of each of a worker's steps.
Times = list[float]


class Round(NamedTuple):
    """What one round measured, seconds.

    parts   of a step, of one process that has the machine to itself
    beside  number of processes -> each one's steps
    link    bytes -> an all-reduce of two ranks
    ranks   number of ranks -> rank 0's steps"""

    parts: dict[str, float]
    beside: dict[int, list[Times]]
    link: dict[int, float]
    ranks: dict[int, Times]


def rounds(config_file: Path, overrides: list[str], count: int, seconds: float) -> list[Round]:
    """Measures.

    overrides  of the configuration; `data.batch` is added for each number of ranks
    seconds    of an arm in a round, at least two steps"""
    with started(config_file, overrides) as pipes:
        alone, ranks = pipes["alone"], {2: pipes["two"], 4: pipes["four"]}
        together: dict[str, Callable[[int], list]] = {
            **{f"{part} alone": partial(ask, alone[:1], part) for part in PARTS},
            **{f"beside {k}": partial(ask, alone[:k], "full") for k in BESIDE},
            **{f"ranks {n}": partial(ask, group, "full") for n, group in ranks.items()},
            **{f"link {size}": partial(ask, ranks[2], size) for size in (SMALL, LARGE)},
        }
        steps = {}
        for name, run in together.items():
            run(2)
            steps[name] = max(2, round(seconds / statistics.mean(run(2)[0])))
        arms = {name: partial(run, steps[name]) for name, run in together.items()}
        found = interleaved(arms, count)
    return [_round({name: values[r] for name, values in found.items()}) for r in range(count)]


def _round(found: dict[str, list[Times]]) -> Round:
    mean = lambda name: statistics.mean(found[name][0])
    return Round(
        parts={part: mean(f"{part} alone") for part in PARTS},
        beside={k: found[f"beside {k}"] for k in BESIDE},
        link={size: mean(f"link {size}") for size in (SMALL, LARGE)},
        ranks={1: found["beside 1"][0], **{n: found[f"ranks {n}"][0] for n in (2, 4)}},
    )


# ---- the prediction


def predicted(job: Job, batch: int, n: int, cores: int, seen: Round) -> Step:
    """The model's step of n ranks with `batch` images each, from a round's parts, its link between
    two ranks and its processes side by side; what n ranks took is not looked at."""
    device = Measured(
        dict.fromkeys(PARTS, 0.0) | {"optimizer": seen.parts["optimizer"]},
        {part: took / batch for part, took in seen.parts.items()} | {"optimizer": 0.0},
    )
    step = {k: statistics.mean(map(statistics.mean, times)) for k, times in seen.beside.items()}
    contention = step[n] / step[1]
    # Sending is work of the same cores: the link slows as the ranks do, from what two ranks see.
    slower = max(1.0, step[n] / step[2])
    # Ranks beyond the cores run while others wait, so that their waiting costs nothing.
    steady = [t / statistics.mean(times) for times in seen.beside[2] for t in times]
    slowest = lambda n: expected_max(empirical(steady), min(n, cores))
    there = machine(seen.link, slower)
    return predict(job._replace(batch=n * batch), device, there, n, contention, slowest)


def machine(link: dict[int, float], slower: float) -> Machine:
    """Loopback, from the all-reduces of two ranks: half of the smallest one is a step's latency, and
    the largest one sends its bytes once, 2 (n-1)/n = 1."""
    latency = slower * link[SMALL] / 2
    bandwidth = LARGE / (link[LARGE] - link[SMALL]) / slower
    steps = Steps(0.0, latency, latency)
    # The loader reads from memory, and its cost is in the side-by-side steps.
    free = float("inf")
    return Machine(
        name="CPU ranks",
        link=Link(max(WORLDS.values()), bandwidth, bandwidth, steps, steps),
        spread=0.0,
        read=free,
        write=free,
        loader=free,
        image=0.0,
        graphs=False,
        busy=1.0,
    )


# ---- the processes


@contextlib.contextmanager
def started(config_file: Path, overrides: list[str]) -> Iterator[dict[str, list[Connection]]]:
    """Pipes to the processes by training, in the order of their ranks; "alone" has four, each a
    training of its own."""
    # What all import is imported once, by the server that they are forked from.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["scaling.worker"])
    pipes: dict[str, list[Connection]] = {name: [] for name in WORLDS}
    processes = []
    try:
        for name, world in WORLDS.items():
            trainings = max(BESIDE) if world == 1 else 1
            for port in (_free_port() for _ in range(trainings)):
                for rank in range(world):
                    here, there = forks.Pipe()
                    about = (there, rank, world, port, config_file, overrides)
                    processes.append(forks.Process(target=serve, args=about, daemon=True))
                    processes[-1].start()
                    there.close()
                    pipes[name].append(here)
        for pipe in (p for group in pipes.values() for p in group):
            pipe.recv()
        yield pipes
    finally:
        for p in processes:
            p.kill()
            p.join()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(pipes: list[Connection], arm: str | int, steps: int) -> list[Times]:
    """Each worker's seconds of so many steps of an arm; all of them run it at the same time."""
    for pipe in pipes:
        pipe.send((arm, steps))
    found = [pipe.recv() for pipe in pipes]
    # In which their loaders fill up beside nobody.
    time.sleep(PAUSE if arm == "full" else 0.0)
    return found
