"""Methods: how the outputs of the networks become losses.

One file is one method, and its name is the registry: methods/moco.py is `method.name: moco`.

Level 2: may import levels 0 and 1 (config, common, kernels, data, models, engine), but neither
teacher nor evals."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdisco.common import dist
from fastdisco.engine.cudagraph import Later
from fastdisco.kernels import launch
from fastdisco.models import DTYPE, Out

# A network as methods call it: views, a list of [B,3,S,S], in; z [V,B,d] out.  The fields of a
# Later are computed on another stream beside what follows: call early, read late.
Forward = Callable[[list[Tensor]], Out | Later]


class Nets(NamedTuple):
    """The networks of one micro batch."""

    # The engine, with gradient.  Call it once a micro batch, with all views.
    student: Callable[[list[Tensor]], Out]
    # The mean student (EMA): no gradient, batch-norm statistics of its own.  None where the
    # method's momentum is None.
    ema: Forward | None
    # No gradient, eval mode.  Call it once a micro batch, before the others: its forward may run
    # beside theirs until its output is read.
    teacher: Forward | None
    # [...,d] -> [...,P], by the student's prototypes as they are now: no gradient.
    prototypes: Callable[[Tensor], Tensor] | None = None


class Progress(NamedTuple):
    """Where in the schedule a micro batch is."""

    # Micro batches before this one; with the seed it names every random draw of a method.
    micro_step: int
    # 0..1 of the whole schedule.
    share: float
    epoch: float = 0.0
    # Optimizer steps before this one.
    step: int = 0


class Method(nn.Module):
    """Without trainable parameters.  Its state dict is its whole resume state, and the same on
    every rank."""

    # How many of the first views the teacher is asked about; None: all.
    teacher_views: int | None = None
    # Whether all views but the first are to be of this rank's share of the batch permuted over
    # ranks, see data.TrainLoader.
    permuted: bool = False
    # The weight of each loss among the scalars that `step` returns; the other scalars are logged.
    weights: dict[str, float]

    def momentum(self, progress: Progress) -> float | None:
        """Of the EMA's update after this step; always None for a method without one."""
        return None

    def frozen(self, progress: Progress) -> tuple[str, ...]:
        """Name prefixes of the student's weights that this step leaves as they are."""
        return ()

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """Named scalars of one micro batch, means over this rank's images."""
        raise NotImplementedError

    def loss(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms that are losses; `terms` is what `step` returned."""
        weighted = (w * terms[name] for name, w in self.weights.items() if name in terms)
        return functools.reduce(torch.add, weighted)

    def after_step(self) -> None:
        """Called once after each optimizer step: prepares what the next step must see, such as a
        queue with the keys of all micro batches."""


def create(name: str, **values: Any) -> Method:
    """The method of methods/<name>.py.

    cfg      its block of the configuration
    dim      width of the embedding
    seed     of the run
    shuffle  how a key encoder's batch is permuted over ranks and groups: gather, load or off"""
    return kind(name)(**values)


def kind(name: str) -> type[Method]:
    """The class of methods/<name>.py."""
    return importlib.import_module(f"fastdisco.methods.{name}").METHOD


# ---- what several methods share


def queue_dtype(name: str) -> torch.dtype:
    """The dtype of a queue's rows; auto: bf16 on a GPU whose tensor cores take it, else fp32."""
    device = dist.device()
    auto = "bf16" if device.type == "cuda" and launch.sweeps(device) else "fp32"
    return DTYPE[auto if name == "auto" else name]


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """Standard deviation over the batch of the unit rows z [B,d], mean over d, times sqrt(d): 1
    when the rows fill the sphere, 0 when they have collapsed."""
    return F.normalize(z.float(), dim=1).std(0, correction=0).mean() * z.shape[1] ** 0.5


def distilled(distill: Tensor, z: Tensor) -> dict[str, Tensor]:
    """DisCo's term, and for the log the mean cosine of student and teacher.

    distill: |s-t|^2 = 2 - 2 cos, summed over the views of z [V,B,d]."""
    return {"distill": distill, "distill/cosine": 1 - distill.detach() / (2 * len(z))}
