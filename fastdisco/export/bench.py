"""Size and speed on a CPU: of a network in torch, and of its ONNX files.

All networks and forms take turns in short rounds, so whatever else the machine does meets all
alike."""

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import nn

from fastdisco.common.files import write_whole
from fastdisco.export.onnx import Session
from fastdisco.models import macs, size

COUNTER = "torch.utils.flop_counter, two operations a MAC: convolutions and matrix products"
# Packages whose versions stand under the table.
TOLD = ("torch", "onnxruntime", "timm")
BATCH = 32
# Timed calls of one image in a round; a round of more would meet another load than its neighbours.
CALLS = 8


# One image with one thread, one with all, and a batch with all.
LOADS = ("one", "all", "batch")


class Form(NamedTuple):
    """A network in one of its forms."""

    network: str
    form: str  # torch, onnx, int8
    backbone: nn.Module
    file: Path | None  # of ONNX forms
    image: int  # side, pixels


def measure(
    forms: Sequence[Form], rounds: int = 20, loads: Sequence[str] = LOADS
) -> list[dict[str, Any]]:
    """A row for each form: parameters, MACs and bytes; milliseconds of one image with one thread and
    with all, p50 and p95 over all calls; images/s in batches of BATCH with all threads; and the
    medians of each round, by which ratios are taken.

    loads: which of LOADS are measured"""
    threads = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    shapes = {"one": (1, 1), "all": (threads, 1), "batch": (threads, BATCH)}
    arms = {(i, load): _arm(form, *shapes[load]) for i, form in enumerate(forms) for load in loads}
    calls: dict[tuple[int, str], list[list[float]]] = {key: [] for key in arms}
    try:
        for r in range(rounds + 1):
            for key in random.Random(r).sample(sorted(arms), len(arms)):
                seconds = arms[key](1 if key[1] == "batch" else CALLS)
                # The first round fills caches.
                if r:
                    calls[key].append(seconds)
    finally:
        torch.set_num_threads(before)
    return [
        _row(form, threads, {load: calls[i, load] for load in loads})
        for i, form in enumerate(forms)
    ]


def machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Of `run.environment`, what these numbers depend on; and how MACs are counted."""
    told = ("cpu", "cores", "commit", "versions")
    return {k: environment[k] for k in told} | {"macs": COUNTER}


def write(path: Path, rows: Sequence[dict[str, Any]], environment: Mapping[str, Any]) -> None:
    """bench.json, for a report."""
    content = {"machine": machine(environment), "rows": list(rows)}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Title and cells of a table for people."""
    title = [
        "network",
        "form",
        "px",
        "M weights",
        "M MACs",
        "MB",
        "ms, 1 thread",
        "p95",
        f"ms, {rows[0]['threads']} threads",
        "p95",
        f"images/s at {BATCH}",
    ]
    cells = [
        [
            r["network"],
            r["form"],
            str(r["image"]),
            f"{r['weights'] / 1e6:.2f}",
            f"{r['macs'] / 1e6:.1f}",
            f"{r['bytes'] / 1e6:.2f}",
            f"{r['p50_ms_1_thread']:.2f}",
            f"{r['p95_ms_1_thread']:.2f}",
            f"{r['p50_ms_all_threads']:.2f}",
            f"{r['p95_ms_all_threads']:.2f}",
            f"{r['images_per_s']:.0f}",
        ]
        for r in rows
    ]
    return [title, *cells]


def _arm(form: Form, threads: int, batch: int) -> Callable[[int], list[float]]:
    """Seconds of each of n calls, after one that does not count."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((batch, 3, form.image, form.image), np.float32)
    session = Session(form.file, threads) if form.file else None
    tensor = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)

    def call() -> object:
        return session.run(x) if session else form.backbone(tensor)

    def run(n: int) -> list[float]:
        torch.set_num_threads(threads)
        seconds = []
        with torch.inference_mode():
            call()
            for _ in range(n):
                begin = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - begin)
        return seconds

    return run


def _row(form: Form, threads: int, calls: dict[str, list[list[float]]]) -> dict[str, Any]:
    flat = {load: [s for one in rounds for s in one] for load, rounds in calls.items()}
    medians = {load: [statistics.median(one) for one in rounds] for load, rounds in calls.items()}
    row: dict[str, Any] = {
        "network": form.network,
        "form": form.form,
        "image": form.image,
        "threads": threads,
        "weights": size(form.backbone),
        "macs": macs(form.backbone, form.image),
        "bytes": form.file.stat().st_size if form.file else _stored(form.backbone),
    }
    for load, name in (("one", "1_thread"), ("all", "all_threads")):
        if load in flat:
            row[f"p50_ms_{name}"] = 1e3 * float(np.percentile(flat[load], 50))
            row[f"p95_ms_{name}"] = 1e3 * float(np.percentile(flat[load], 95))
    if "batch" in flat:
        row["images_per_s"] = BATCH / statistics.median(flat["batch"])
    return row | {"rounds_s": medians}


def _stored(backbone: nn.Module) -> int:
    """Bytes of the weights as safetensors."""
    weights = {k: x.contiguous() for k, x in backbone.state_dict().items()}
    return len(safetensors.torch.save(weights))
