"""What a run says once, before its first step: what will be trained and on what, and what about the
data may surprise the user."""

from collections.abc import Iterator
from pathlib import Path

import torch

from fastdisco import data, engine
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.config import Config, Dino, Moco, Seed, Swav
from fastdisco.data.folder import told
from fastdisco.data.lines import printable
from fastdisco.run.students import TrainState


def announce(
    cfg: Config,
    listing: data.Listing,
    states: list[TrainState],
    micro: int,
    steps: int,
    start: int,
    folder: Path,
    device: torch.device,
) -> None:
    """Says what will be trained and on what, before the first step."""
    taught = f"teacher {cfg.teacher.file}" if cfg.teacher else "no teacher"
    for s in states:
        size = f"{s.size / 1e6:.1f} M weights with its head"
        say(f"{folder}: {_titled(s.name)}{s.cfg.student.arch} ({size}), {taught}")
    say(
        f"{len(listing.files)} images of {len(listing.classes)} classes, batch {cfg.data.batch} = "
        f"{dist.world()} ranks x {micro} images x {cfg.data.accumulate} accumulated, {steps} steps, "
        f"{cfg.engine.precision}, ZeRO stage {cfg.engine.stage}, on {engine.describe(device)}"
    )
    if left := len(listing.left_out):
        say(
            f"{left} of them {'is' if left == 1 else 'are'} left out by the quarantine "
            f"(data.quarantine: {cfg.data.quarantine})"
        )
    if dist.world() * cfg.bn.groups == 1 and getattr(cfg.method, "contrast", 0):
        say(
            "one rank and bn.groups 1: MoCo can leak through the batch statistics; set bn.groups "
            "(the paper's: 32 images a group)"
        )
    if device.type == "cuda" and cfg.perf.cudnn_benchmark and start < steps:
        say(
            "the first step and the first evaluation may be silent for a minute or two: cuDNN looks "
            "for what is fastest here (perf.cudnn_benchmark)"
        )
    if cfg.optim.lr_scale != "none":
        rates = ", ".join(
            f"{_titled(s.name)}lr {s.lr:.4g} for optim.lr {s.cfg.optim.lr:.4g} at batch 256"
            for s in states
        )
        say(f"optim.lr_scale: {cfg.optim.lr_scale}, {rates}")
    if start:
        say(f"continuing after step {start}")


def remarks(cfg: Config, train: data.Listing, val: data.Listing | None) -> Iterator[str]:
    """A sentence for each: files that are passed over, a queue that is larger than an epoch, and
    prototypes that never learn."""
    for listing in (train, val):
        if listing and listing.passed_over:
            yield f"{listing.source}: passed over: {printable(told(listing.passed_over))}"
    method = cfg.method
    images = len(train.kept) // cfg.data.batch * cfg.data.batch
    compared = isinstance(method, Seed) or (isinstance(method, Moco) and method.contrast > 0)
    if compared and images and method.queue > images:
        yield (
            f"method.queue: {method.queue} is more than the {images} images of an epoch, so images "
            f"are compared with their own older embeddings; a queue below {images} avoids it"
        )
    yield from _never_learns(cfg, images // cfg.data.batch)


def _never_learns(cfg: Config, per_epoch: int) -> Iterator[str]:
    """Where the prototypes are kept from learning until the training ends; per_epoch: its steps."""
    method = cfg.method
    if isinstance(method, Swav):
        key, until = "freeze_steps", method.freeze_steps
    elif isinstance(method, Dino):
        key, until = "freeze_epochs", method.freeze_epochs * per_epoch
    else:
        return
    steps = cfg.run.epochs * per_epoch
    steps = min(steps, cfg.run.max_steps or steps)
    if steps and until >= steps:
        yield (
            f"method.{key}: the prototypes are kept as they are for {until} steps, and the training "
            f"ends after {steps}, so they never learn; a smaller value lets them learn"
        )


def _titled(name: str) -> str:
    """A student's name before what is said of it; '' where there is one student."""
    return f"{name}: " if name else ""
