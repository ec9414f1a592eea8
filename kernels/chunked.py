"""InfoNCE over a queue in one pass of chunks, gradient included: memory of a chunk's logits instead of B x K."""
import math

import torch
from torch import Tensor

CHUNK = 2**21  # logits at a time: 8 MiB of float32, which stays in a core's share of the cache
FIXED_MAX_FROM = 0.03  # temperature down to which exp((cos - 1) / temp) stays a normal float32 for every cosine


class InfoNCE(torch.autograd.Function):
    """Unit rows q, k [B,d], queue [K,d], all of one dtype -> the loss; gradient to q, computed in the forward.

    Nothing of the queue is kept for the backward, so it may be overwritten right after the forward."""

    @staticmethod
    def forward(ctx, q, k, queue, temp):
        pull, negatives, push = _sweep(q, queue, temp, ctx.needs_input_grad[0])
        # log((p + n) / p) = log1p(n / p), with n = sum exp(s_j) and p = exp(s_pos): subtracting two large logarithms instead
        # loses all digits of an easy image's loss
        log_ratio = negatives - (q * k).sum(1) / temp  # log(n / p)
        loss = torch.logaddexp(log_ratio, torch.zeros_like(log_ratio)).mean()
        if ctx.needs_input_grad[0]:
            share = torch.sigmoid(log_ratio) / (len(q) * temp)  # n / (n + p), of the mean
            ctx.save_for_backward(share[:, None] * (push / pull[:, None] - k))
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        return upstream * grad, None, None, None


def _sweep(q: Tensor, queue: Tensor, temp: float, moment: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(l, log sum_j exp(s_j), acc), s_j = q.queue_j / temp, l [B] = sum_j exp(s_j - m) and acc [B,d] = sum_j exp(s_j - m) queue_j.

    m is 1 / temp, the most a cosine can give, or below FIXED_MAX_FROM a row's running maximum."""
    rows = max(1, CHUNK // len(q))
    x = q / temp
    fixed = temp >= FIXED_MAX_FROM
    m = q.new_full((len(q), 1), 1 / temp if fixed else -math.inf)
    l = q.new_zeros(len(q))
    acc = torch.zeros_like(q) if moment else None
    for part in queue.split(rows):
        s = torch.addmm(m, x, part.T, beta=-1) if fixed else x @ part.T  # [B,rows]
        if not fixed:
            new = torch.maximum(m, s.amax(1, keepdim=True))
            scale = (m - new).exp_()
            l *= scale[:, 0]
            if moment:
                acc *= scale
            m = new
            s -= m
        p = s.exp_()
        l += p.sum(1)
        if moment:
            acc.addmm_(p, part)
    return l, l.log() + m[:, 0], acc
