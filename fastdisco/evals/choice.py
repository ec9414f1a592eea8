"""Which of several settings is reported: chosen on images held out of training, never on those that
are reported."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdisco.common import dist
from fastdisco.common.errors import UserError


def report(
    what: str, names: Sequence[str], val: Tensor, held: Tensor | None
) -> tuple[dict[str, float], int]:
    """Named numbers, and the row of the setting that they report.

    what       begins every name
    names      of the G settings
    val, held  [G] accuracies on the reported images and on those held out; None: nothing was
    `<what>_top1_selected` is the reported accuracy of the setting best on the images held out, of
    equally good ones the first; `<what>_top1_best_on_val` is the best of all, as papers report it
    that choose on the reported images.  Without images held out there is no `selected`, and the
    row is that of the best on the reported images."""
    found = {f"{what}_top1_best_on_val": float(val.max())}
    if held is None:
        return found, int(val.argmax())
    at = int(held.argmax())
    chosen = {f"{what}_top1_selected": float(val[at]), f"{what}_top1_held_out": float(held[at])}
    return chosen | found, at


def setting(name: str, held: object) -> str:
    """The name of the setting that `report` chose: it says so where the reported images chose it."""
    return name if held is not None else f"{name}_best_on_val"


def accuracy(predictions: Tensor, label: Tensor) -> Tensor:
    """[G] float64 over all ranks of predictions [G,n] of this rank's own images [n]."""
    right = dist.all_sum((predictions == label).sum(1).double())
    return right / dist.all_sum(torch.tensor(float(len(label)), device=label.device))


def classes_of(logits: Tensor) -> Tensor:
    """[N,C] -> [N]: the class with the largest logit; -1, which is never right, where one is no
    finite number."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def refuse_all_broken(what: str, finite: Tensor) -> None:
    """finite: [G] bool.  Raises UserError where no setting has weights that are numbers."""
    if not bool(finite.any()):
        raise UserError(
            f"{what}: every learning rate diverged; give smaller ones, or normalised features"
        )
