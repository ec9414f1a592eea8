"""The cross-view loss of SwAV and DINO in plain torch.  For the backward it keeps the scores and
their log-sum-exp, and no probabilities of the student.

The prototypes need a gradient themselves, so there is no one-pass form as for a queue.

Shapes: V views, G of them with a target, B images, P prototypes."""

import functools
from typing import Any

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
    some_targets = 1 <= len(targets) <= len(scores)
    alike = scores.ndim == 3 and scores.shape[1:] == targets.shape[1:]
    if not (alike and some_targets and len(scores) > 1):
        raise ValueError(
            f"swapped: targets {list(targets.shape)} must be [G,B,P] of the first G of the V >= 2 "
            f"views of scores {list(scores.shape)}"
        )
    checks.targets("swapped", dict(targets=targets))
    checks.positive("swapped", dict(temp=temp))
    with torch.autocast(scores.device.type, enabled=False):
        return _Swapped.apply(scores, targets, temp)


class _Swapped(torch.autograd.Function):
    """By hand, since autograd would keep every view's log-probabilities [B,P]."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, temp: float) -> Tensor:
        lse, loss = [], scores.new_zeros((), dtype=wide(scores))
        for v, mine in enumerate(scores):
            mine, target = mine.to(wide(scores)) / temp, _target(targets, v, scores)
            lse.append(mine.logsumexp(1))
            loss = loss + (target.sum(1) * lse[v] - (target * mine).sum(1)).mean()
        ctx.save_for_backward(scores, targets, torch.stack(lse))
        ctx.temp = temp
        return loss / _pairs(scores, targets)

    # torch declares the arguments as *grad_outputs.
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        scores, targets, lse = ctx.saved_tensors
        scale = upstream / (ctx.temp * scores.shape[1] * _pairs(scores, targets))
        grad = torch.empty_like(scores)
        for v, mine in enumerate(scores):
            p = torch.exp(mine.to(wide(scores)) / ctx.temp - lse[v][:, None])
            target = _target(targets, v, scores)
            grad[v] = (target.sum(1, keepdim=True) * p - target) * scale
        return grad, None, None


def _target(targets: Tensor, v: int, scores: Tensor) -> Tensor:
    """[B,P]: the sum of all views' targets but view v's own; cross-entropy is linear in it."""
    others = [target for g, target in enumerate(targets) if g != v]
    if not others:
        return torch.zeros_like(targets[0], dtype=wide(scores))
    return functools.reduce(torch.add, (target.to(wide(scores)) for target in others))


def _pairs(scores: Tensor, targets: Tensor) -> int:
    return len(targets) * (len(scores) - 1)
