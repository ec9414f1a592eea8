"""Methods: how the networks' outputs become losses.  A module's name is its registry: methods/moco.py is `method.name: moco`."""
import importlib
from typing import Callable, NamedTuple

from torch import Tensor, nn

from fastdisco.models import Out
from fastdisco.views import Crop


class Nets(NamedTuple):
    """Three callables of one signature, list[Tensor] -> Out."""

    student: Callable[[list[Tensor]], Out]  # the engine; called once a micro batch with all views
    ema: Callable[[list[Tensor]], Out]  # the mean student: no grad, own batch-norm statistics
    teacher: Callable[[list[Tensor]], Out] | None  # no grad, eval


class Progress(NamedTuple):
    step: int  # micro batches before this one; with the seed it names every random draw of a method
    share: float  # 0..1 of the training


class Method(nn.Module):
    """Has no trainable parameters; its buffers are its whole resume state."""

    views: tuple[Crop, ...]  # which crops it wants
    permuted: bool = False  # all views but the first are to be of this rank's share of the permuted batch, see data.TrainLoader
    weights: dict[str, float]  # what `step` returns under these names is weighed and added to the loss; the rest is logged

    def head(self, dim: int) -> nn.Module:
        """The projection head on a backbone's `dim` features; the teacher's and the mean student's end in the same width."""
        raise NotImplementedError

    def momentum(self, progress: Progress) -> float:
        """Of the mean student's update after this step."""
        raise NotImplementedError

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """Named scalars of one micro batch, means over this rank's images."""
        raise NotImplementedError

    def after_step(self):
        """After the optimizer's step: what the next step must see, once for all its micro batches."""


def create(name: str, **values) -> Method:
    """The method of methods/<name>.py from its config block and the values it shares with the networks."""
    return importlib.import_module(f"fastdisco.methods.{name}").METHOD(**values)
