"""Methods: how the networks' outputs become losses.  A module's name is its registry:
methods/moco.py is `method.name: moco`."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdisco.common import dist
from fastdisco.models import DTYPE, Out


class Nets(NamedTuple):
    """Callables of one signature, list[Tensor] -> Out, and the prototypes' own.

    ema and teacher may give a cudagraph.Later, whose fields are computed beside what follows: call
    early, read late."""

    student: Callable[[list[Tensor]], Out]  # the engine; called once a micro batch with all views
    # The mean student: no grad, own batch-norm statistics; None where the method's momentum is.
    ema: Callable[[list[Tensor]], Out] | None
    # No grad, eval; called once a micro batch, first, and read late: it may run beside the rest.
    teacher: Callable[[list[Tensor]], Out] | None
    # [...,d] -> [...,P], the student's as it stands: no grad.
    prototypes: Callable[[Tensor], Tensor] | None = None


class Progress(NamedTuple):
    # Micro batches before this one; with the seed it names every random draw of a method.
    micro_step: int
    share: float  # 0..1 of the whole schedule
    epoch: float = 0.0
    step: int = 0  # optimizer steps before this one


class Method(nn.Module):
    """Has no trainable parameters; its state dict is its whole resume state, the same on every
    rank."""

    # How many of the first views the teacher is asked about; None: all.
    teacher_views: int | None = None
    # All views but the first are to be of this rank's share of the permuted batch, see
    # data.TrainLoader.
    permuted: bool = False
    weights: dict[str, float]  # of the losses among what `step` returns; the rest is logged

    def momentum(self, progress: Progress) -> float | None:
        """Of the mean student's update after this step; None, always, for methods that have no mean
        student."""
        return None

    def frozen(self, progress: Progress) -> tuple[str, ...]:
        """What the student's weights that this step leaves alone begin with in their names."""
        return ()

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """Named scalars of one micro batch, means over this rank's images."""
        raise NotImplementedError

    def loss(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms that are losses; `terms` is what `step` returned."""
        return sum(weight * terms[name] for name, weight in self.weights.items() if name in terms)

    def after_step(self):
        """After the optimizer's step: what the next step must see, once for all its micro
        batches."""


def create(name: str, **values) -> Method:
    """The method of methods/<name>.py.

    cfg      its block of the configuration
    dim      width of the embedding
    seed     of the run
    shuffle  permute a key encoder's batch over ranks and groups"""
    return kind(name)(**values)


def kind(name: str) -> type[Method]:
    return importlib.import_module(f"fastdisco.methods.{name}").METHOD


def queue_dtype(name: str) -> torch.dtype:
    """Of a queue's rows; auto: bf16 on a GPU, whose tensor cores want it, else fp32."""
    auto = "bf16" if dist.device().type == "cuda" else "fp32"
    return DTYPE[auto if name == "auto" else name]


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """Standard deviation over the batch of the unit rows z [B,d], mean over d, times sqrt(d): 1
    when they fill the sphere, 0 when collapsed."""
    return F.normalize(z.float(), dim=1).std(0, correction=0).mean() * z.shape[1] ** 0.5


def distilled(distill: Tensor, z: Tensor) -> dict[str, Tensor]:
    """DisCo's term, and for the log the mean cosine of student and teacher: |s-t|^2 = 2 - 2 cos,
    summed over the views of z [V,B,d]."""
    return {"distill": distill, "distill/cosine": 1 - distill.detach() / (2 * len(z))}
