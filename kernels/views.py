"""The cross-view loss of SwAV and DINO in plain torch: it keeps the scores and their log-sum-exp,
no probabilities of the student.

The prototypes need a gradient themselves, so there is no one-pass form as for a queue."""

import torch
from fastdisco.kernels import checks
from fastdisco.kernels.reference import wide
from torch import Tensor


def swapped(scores: Tensor, targets: Tensor, temp: float) -> Tensor:
    """Each of the first views' targets predicted from every other view.  SwAV, arXiv:2006.09882,
    equation 2; DINO, arXiv:2104.14294, equation 3.

    scores   [V,B,P] raw, any float dtype; gradient to them only, in their dtype
    targets  [G,B,P] probabilities, of views 0..G-1: SwAV's codes, DINO's centred and sharpened
             teacher
    temp     > 0; divides the scores
    Returns a float32 scalar, the mean over the G (V-1) pairs and B in nats (float64 if scores is
    float64).
    Raises ValueError when targets requires grad, the shapes do not fit, there is only one view or
    temp is not positive."""
    if (
        scores.ndim != 3
        or scores.shape[1:] != targets.shape[1:]
        or not 1 <= len(targets) <= len(scores)
        or len(scores) < 2
    ):
        raise ValueError(
            f"swapped: targets {list(targets.shape)} must be [G,B,P] of the first G of the V >= 2 "
            f"views of scores {list(scores.shape)}"
        )
    checks.targets("swapped", dict(targets=targets))
    checks.positive("swapped", dict(temp=temp))
    with torch.autocast(scores.device.type, enabled=False):
        return _Swapped.apply(scores, targets, temp)


class _Swapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, targets, temp):
        lse, loss = [], 0.0
        for v, mine in enumerate(scores):
            mine, target = mine.to(wide(scores)) / temp, _target(targets, v, scores)
            lse.append(mine.logsumexp(1))
            loss = loss + (target.sum(1) * lse[v] - (target * mine).sum(1)).mean()
        ctx.save_for_backward(scores, targets, torch.stack(lse))
        ctx.temp = temp
        return loss / _pairs(scores, targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        scores, targets, lse = ctx.saved_tensors
        scale = upstream / (ctx.temp * scores.shape[1] * _pairs(scores, targets))
        grad = torch.empty_like(scores)
        for v, mine in enumerate(scores):
            p, target = (
                torch.exp(mine.to(wide(scores)) / ctx.temp - lse[v][:, None]),
                _target(targets, v, scores),
            )
            grad[v] = (target.sum(1, keepdim=True) * p - target) * scale
        return grad, None, None


def _target(targets: Tensor, v: int, scores: Tensor) -> Tensor:
    """[B,P]: the sum of all views' targets but view v's own; cross-entropy is linear in it."""
    others = [t for g, t in enumerate(targets) if g != v]
    if not others:
        return torch.zeros_like(targets[0], dtype=wide(scores))
    return sum(t.to(wide(scores)) for t in others)


def _pairs(scores: Tensor, targets: Tensor) -> int:
    return len(targets) * (len(scores) - 1)
