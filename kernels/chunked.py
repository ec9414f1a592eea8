"""InfoNCE against a long queue in one pass over it, never holding the B x K logits."""
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco.kernels import reference

LOGITS = 1 << 21  # held at a time: 8 MiB in float32, which caches like; smaller loses to start-up, larger to memory
FIXED = 0.03  # temperature from which exp((s-1)/temp) of any cosine s is a normal float32, so that 1/temp serves as the maximum


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temp: float) -> Tensor:
    """`reference.info_nce` to rounding, with the gradient computed beside the loss: the queue may be overwritten before backward.

    With E = log-sum-exp of the negatives' logits and s the positive's, the loss is log(1 + exp(E-s)).  The textbook log(exp(s) + exp(E)) - s
    cancels where the negatives are far: on easy data at temp 0.03 it loses 5 % in float32."""
    q = reference.unit(q)
    k = reference.unit(k.detach()).to(q.dtype)
    return _InfoNCE.apply(q, k, queue.detach(), temp, torch.is_grad_enabled() and q.requires_grad)


class _InfoNCE(torch.autograd.Function):
    """q, k [B,d] and queue [K,d] unit rows."""

    @staticmethod
    def forward(ctx, q, k, queue, temp, differentiate):
        total, top, mean = _negatives(q, queue, temp, differentiate)
        margin = ((q * k).sum(1) - top) / temp - total.log()  # [B] s - E
        if differentiate:
            push = torch.sigmoid(-margin)[:, None]  # [B,1] the negatives' share of the softmax
            ctx.save_for_backward(push * (mean - k) / (temp * len(q)))
        return -F.logsigmoid(margin).mean()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable lets it pass where upstream needs no gradient
            raise RuntimeError("info_nce is differentiable once: its gradient is computed in the forward")
        (grad,) = ctx.saved_tensors
        return grad * upstream, None, None, None, None


def _negatives(q: Tensor, queue: Tensor, temp: float, differentiate: bool) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """sum_j exp((s_j - top) / temp) [B], the cosine top [B] or 1 that was taken off, and the softmax mean of the queue's rows [B,d]."""
    rows = max(1, LOGITS // len(q))
    scratch = q.new_empty(len(q) * min(rows, len(queue)))
    total = q.new_zeros(len(q))
    mean = torch.zeros_like(q) if differentiate else None
    fixed = temp >= FIXED
    top = 1.0 if fixed else q.new_full((len(q),), -torch.inf)
    bias = q.new_tensor(-1 / temp if fixed else 0.0)
    for part in queue.split(rows):
        part = part.to(q.dtype)
        p = torch.addmm(bias, q, part.T, alpha=1 / temp, out=scratch[: len(q) * len(part)].view(len(q), -1))  # [B,rows]
        if not fixed:
            new = torch.maximum(top, p.amax(1) * temp)
            shrink = torch.exp((top - new) / temp)
            total *= shrink
            if differentiate:
                mean *= shrink[:, None]
            p -= new[:, None] / temp
            top = new
        p.exp_()
        total += p.sum(1)
        if differentiate:
            mean.addmm_(p, part)
    if differentiate:
        mean /= total[:, None]
    return total, top, mean
