"""Multinomial logistic regression by L-BFGS on features computed once, for several C.

Letters: N images of all ranks, F features, C classes (and C, the inverse penalty, as in
scikit-learn)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco.common import dist
from fastdisco.evals import choice, shares
from fastdisco.evals.features import Features, count
from fastdisco.evals.settings import CS, ITERATIONS

# Logits in memory at a time.
CELLS = 2**24
# scikit-learn ends at 1e-4, and by the same measure.
TOLERANCE = 1e-5


@torch.no_grad()
def run(
    train: Features,
    held: Features | None,
    val: Features,
    classes: int,
    cs: Sequence[float] = CS,
    iterations: int = ITERATIONS,
) -> dict[str, float]:
    """Shares of validation images, 0..1; names as in `choice.report`, and the C that was chosen.

    train, held, val  this rank's own parts; held: to choose C on; None: no choice
    Features are standardised by the training images' mean and deviation, so that C means the same
    for every network."""
    return predict(train, held, val, classes, cs, iterations)[0]


def predict(
    train: Features,
    held: Features | None,
    val: Features,
    classes: int,
    cs: Sequence[float] = CS,
    iterations: int = ITERATIONS,
    watch: Callable[[int], None] = lambda ended: None,
) -> tuple[dict[str, float], Tensor]:
    """The numbers of `run`, and the classes that the reported C predicts for this rank's validation
    images [n].

    watch  is called on all ranks alike, with 1 after each C and else with 0, and may raise to stop"""
    mean, deviation = moments(train.x)
    even = lambda part: part._replace(x=standardised(part.x, mean, deviation))
    train, val, held = even(train), even(val), None if held is None else even(held)
    found, start = [], None
    for c in sorted(cs):
        start = fit(train, classes, c, start, iterations, watch=lambda: watch(0))
        found.append(start)
        watch(1)
    classes_of = lambda part: torch.stack([choice.classes_of(part.x @ w + b) for w, b in found])
    on_val = classes_of(val)
    on_held = None if held is None else choice.accuracy(classes_of(held), held.label)
    names = [f"{c:g}" for c in sorted(cs)]
    numbers, at = choice.report("logistic", names, choice.accuracy(on_val, val.label), on_held)
    name = choice.setting("logistic_c", held)
    return numbers | {name: float(sorted(cs)[at])}, on_val[at]


def fit(
    train: Features,
    classes: int,
    c: float,
    start: tuple[Tensor, Tensor] | None = None,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    watch: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Weights [F,C] and biases [C]: argmin of the sum of cross-entropies + |W|^2 / (2 c), in the
    features' precision.

    start      where to begin; None: at 0
    tolerance  ends where no component of the gradient of the mean over images is larger
    watch      is called after each evaluation of the objective, and may raise to stop"""
    n, width = count(train.x), train.x.shape[1]
    both = train.x.new_zeros(width + 1, classes)
    if start is not None:
        both = torch.cat([start[0], start[1][None]])
    both = both.clone().requires_grad_()
    method = torch.optim.LBFGS(
        [both],
        max_iter=iterations,
        history_size=10,
        tolerance_grad=tolerance,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, gradient = _objective(train, both.detach(), n, c)
        both.grad = gradient
        watch()
        return loss

    method.step(closure)
    return both.detach()[:-1], both.detach()[-1]


def moments(own: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [F] float64 over all ranks."""
    n = count(own)
    x = own.double()
    mean = dist.all_sum(x.sum(0)) / n
    return mean, (dist.all_sum((x - mean).square().sum(0)) / n).sqrt()


def standardised(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """A feature that does not vary stays 0."""
    return ((x - mean) / torch.where(deviation > 0, deviation, 1.0)).to(x.dtype)


def _objective(train: Features, both: Tensor, n: int, c: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient, both over n, summed over ranks."""
    w, b = both[:-1], both[-1]
    loss, grad = both.new_zeros(1), torch.zeros_like(both)
    rows = max(1, CELLS // len(b))
    for x, y in zip(train.x.split(rows), train.label.split(rows)):
        logits = torch.addmm(b, x, w)
        loss += F.cross_entropy(logits, y, reduction="sum")
        p = shares.normal_(logits.softmax(1))
        p[torch.arange(len(y), device=y.device), y] -= 1
        grad[:-1] += x.T @ p
        grad[-1] += p.sum(0)
    dist.all_sum(loss)
    dist.all_sum(grad)
    loss += w.square().sum() / (2 * c)
    grad[:-1] += w / c
    return loss[0] / n, grad / n
