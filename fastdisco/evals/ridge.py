"""Ridge regression to one-hot labels on features computed once: all penalties from one
eigendecomposition.

Letters: N images of all ranks, F features, C classes, G penalties."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdisco.common import dist
from fastdisco.evals import choice
from fastdisco.evals.features import Features
from fastdisco.evals.settings import STRENGTHS

ROWS = 8192


class Solution(NamedTuple):
    """The regression for any penalty, in float64."""

    values: Tensor  # [F] eigenvalues of the centred scatter matrix
    vectors: Tensor  # [F,F], in columns
    target: Tensor  # [F,C] vectors^T X^T Y, both centred
    mean: Tensor  # [F] of the features
    share: Tensor  # [C] of the classes

    def weights(self, penalty: float) -> tuple[Tensor, Tensor]:
        """[F,C] and [C]: argmin of |X W + b - Y|^2 + penalty |W|^2, b unpenalised; of several, as
        without a penalty, the smallest W."""
        least = self.values.max() * len(self.values) * torch.finfo(self.values.dtype).eps
        # Without a penalty, what rounding leaves along a direction that no image has would be blown up.
        there = (self.values > least) | (penalty > 0)
        inverse = torch.where(there, 1 / (self.values + penalty), 0.0)
        w = self.vectors @ (self.target * inverse[:, None])
        return w, self.share - self.mean @ w


@torch.no_grad()
def run(
    train: Features,
    held: Features | None,
    val: Features,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, float]:
    """Shares of validation images, 0..1, whose class has the highest score; names as in
    `choice.report`, and the penalty that was chosen as a multiple of the mean eigenvalue.

    train, held, val  this rank's own parts; held: to choose the penalty on; None: no choice"""
    return predict(train, held, val, classes, strengths)[0]


def predict(
    train: Features,
    held: Features | None,
    val: Features,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[dict[str, float], Tensor]:
    """The numbers of `run`, and the classes that the reported penalty predicts for this rank's
    validation images [n]."""
    solution = solve(train, classes)
    mean_value = float(solution.values.mean())
    found = [solution.weights(s * mean_value) for s in strengths]
    classes_of = lambda part: torch.stack([_classes_of(part.x, w, b) for w, b in found])
    on_val = classes_of(val)
    on_held = None if held is None else choice.accuracy(classes_of(held), held.label)
    names = [f"{s:.3g}" for s in strengths]
    numbers, at = choice.report("ridge", names, choice.accuracy(on_val, val.label), on_held)
    name = choice.setting("ridge_strength", held)
    return numbers | {name: float(strengths[at])}, on_val[at]


@torch.no_grad()
def solve(train: Features, classes: int) -> Solution:
    """From sums over all ranks in float64, so their number does not show."""
    width, device = train.x.shape[1], train.x.device
    scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
    by_class = torch.zeros(classes, width, dtype=torch.float64, device=device)
    there = torch.bincount(train.label, minlength=classes).double()
    for x, y in zip(train.x.split(ROWS), train.label.split(ROWS)):
        x = x.double()
        scatter += x.T @ x
        by_class.index_add_(0, y, x)
    for t in (scatter, by_class, there):
        dist.all_sum(t)
    n = there.sum()
    mean, share = by_class.sum(0) / n, there / n
    scatter -= n * torch.outer(mean, mean)
    # Rounding leaves those that are 0 a little beside it, and no penalty may meet its negative.
    values, vectors = torch.linalg.eigh(scatter)
    centred = by_class.T - torch.outer(mean, there)
    return Solution(values.clamp(min=0), vectors, vectors.T @ centred, mean, share)


def _classes_of(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """[n]; in the features' own precision."""
    w, b = w.to(x.dtype), b.to(x.dtype)
    return torch.cat([choice.classes_of(part @ w + b) for part in x.split(ROWS)])
