"""What each stage of our loader costs, from differences between graphs that go on one stage
further or have one step more."""

import time
from pathlib import Path

import numpy as np
import torch
from harness import interleaved, seconds

from fastdisco import data
from fastdisco.config import Crop
from fastdisco.data import draws, pipelines
from fastdisco.data.decoder import graphs
from loading.arms import CPU
from loading.theirs import CROP

# Images of a stage in a round.
IMAGES = 256
# Stage -> the graph whose time is subtracted from that of its own.
BEFORE = {
    "reading": None,
    "decoding": "reading",
    "draws": "decoding",
    "resizing": "draws",
    "normalising": "resizing",
    "jitter": "normalising",
    "gray": "normalising",
    "blur": "normalising",
}
PLAIN = dict(jitter_p=0, gray_p=0, blur_p=0)


def profile(root: Path, batch: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one core for each stage of an image in both views, in each round."""
    steps = max(1, IMAGES // batch)

    def run(pipe) -> float:
        # What was made ahead does not count.
        for _ in range(CPU.prefetch + 1):
            pipe.run()
        return 1e3 * seconds(pipe.run, steps, time.process_time) / batch

    arms = {name: (lambda pipe=pipe: run(pipe)) for name, pipe in pipes(root, batch).items()}
    cost = interleaved(arms, rounds, warm_up=1)
    nothing = [0.0] * rounds
    return {
        stage: [a - b for a, b in zip(cost[stage], cost[before] if before else nothing)]
        for stage, before in BEFORE.items()
    }


def pipes(root: Path, batch: int) -> dict:
    """A DALI pipeline for each stage, whose graph ends there."""
    from nvidia.dali import pipeline_def

    graph, listing = graphs(), data.listing(root)
    files = np.random.default_rng(0).permutation(len(listing.files))
    files = files[: len(files) // batch * batch] if len(files) >= batch else np.resize(files, batch)
    reader, words = pipelines.reader(listing, files, ""), draws.words(files, 0).reshape(-1, batch)

    def fed(crops: tuple[Crop, ...]):
        return lambda i: draws.feed(crops, 0, words[i % len(words)], "cpu")

    @pipeline_def
    def upto(stage: str):
        encoded = graph._read(reader)
        if stage == "reading":
            return encoded
        image, hw = graph._decoded(encoded, CPU)
        if stage == "decoding":
            return image
        crops = (Crop(**PLAIN),) * 2
        tries, place, each = graph._fed(crops, fed(crops), CPU)
        start, end = graph._boxes(hw, tries, place, crops)
        flips = tuple(d["flip"] for d in each)
        if stage == "draws":
            return image, start, end, *flips
        box = lambda v: dict(roi_start=start[v, 0], roi_end=end[v, 0])
        views = [graph.fn.resize(image, size=[c.size] * 2, **box(v)) for v, c in enumerate(crops)]
        return *views, *flips

    pipe = pipelines.settings(batch, 1, torch.device("cpu"), CPU)
    found = {stage: upto(stage, **pipe) for stage in ("reading", "decoding", "draws", "resizing")}
    for name in ("normalising", "jitter", "gray", "blur"):
        own = {} if name == "normalising" else {f"{name}_p": getattr(CROP, f"{name}_p")}
        crops = (Crop(**PLAIN | own),) * 2
        found[name] = graph.train(crops, reader, fed(crops), CPU, **pipe)
    return found
