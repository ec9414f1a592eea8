"""The queue losses in one pass over the queue, in torch: never holding the B x K logits.  For the
CPU, and on CUDA for rows that are too wide."""

import torch
import torch.nn.functional as F
from fastdisco.kernels.reference import EPS, unit, wide
from torch import Tensor

COLD = 0.025  # the temperature below which exp((s-1) / temp) of some cosine is no normal float32
# Held at a time: 8 MiB in float32, which caches like; smaller loses to start-up, larger to memory.
LOGITS = 1 << 21


def fixed_maximum(temp: float, own: bool) -> bool:
    """Whether 1 / temp, the largest logit there can be, serves as the softmax's maximum for every
    row, so that no maximum need be looked for.

    Then exp((s-1) / temp) must not vanish where it counts.  From 0.0229 on it is a normal float32
    for any cosine s.  Where the row's own feature, with s = 1, is among the scored (`own`: SEED's
    teacher), what vanishes is below 1e-38 of the sum at any temperature; below 0.01 we take the
    running maximum all the same, for there a rounding of s already changes the exponent."""
    return temp >= (0.01 if own else 0.03)


def moco(
    z: Tensor, k: Tensor, t: Tensor | None, queue: Tensor, temp: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.moco.

    With E = log-sum-exp of the negatives' logits and s the positive's, the contrast is log(1 +
    exp(E-s)).  The textbook log(exp(s) + exp(E)) - s cancels where the negatives are far: on easy
    data at temp 0.03 it loses 5 % in float32."""
    z = z.to(wide(z))
    x, k = unit(z), unit(k).to(z.dtype)
    q = x[0]
    total, top, mean = _moments(
        q, _column(q, temp), queue, differentiate, fixed_maximum(temp, own=False), temp < COLD
    )
    margin = ((q * k).sum(1) - top) / temp - total.log()  # [B] s - E
    terms = torch.stack([-F.logsigmoid(margin).mean(), margin.new_zeros(())])
    contrast, distill = z.new_empty(0), z.new_empty(0)
    if differentiate:
        push = torch.sigmoid(-margin)[:, None]  # [B,1] the negatives' share of the softmax
        contrast = _through_unit(push * (mean - k) / (temp * len(q)), q, z[0])
    if t is not None:
        apart = x - unit(t).to(z.dtype)  # [V,B,d]
        terms[1] = apart.square().sum(-1).mean(-1).sum()
        if differentiate:
            distill = _through_unit(apart * (2 / len(q)), x, z)
    return terms, contrast, distill


def seed(
    zs: Tensor, zt: Tensor, queue: Tensor, temp_s: float, temp_t: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """See ops.seed.

    Both distributions are over the teacher's own feature t and the queue.  With a and b the queue's
    share of the student's and the teacher's, M_s and M_t the mean rows of the queue under either,
    the loss is log(1 + exp(E-s)) + b (x.t - x.M_t) / temp_s: nothing large is subtracted."""
    zs = zs.to(wide(zs))
    x, t = unit(zs), unit(zt).to(zs.dtype)
    n = len(x)
    fixed = fixed_maximum(temp_s, own=False) and fixed_maximum(temp_t, own=True)
    cold = min(temp_s, temp_t) < COLD
    ts, tt = _column(x, temp_s), _column(t, temp_t)
    if differentiate:
        both = _moments(torch.cat([x, t]), torch.cat([ts, tt]), queue, True, fixed, cold)
        (total_s, total_t), (top_s, top_t), (mean_s, mean_t) = [v.split(n) for v in both]
    else:
        total_s, top_s, _ = _moments(x, ts, queue, False, fixed, cold)
        total_t, top_t, mean_t = _moments(t, tt, queue, True, fixed, cold)
    own = (x * t).sum(1)  # [B] the student's cosine to the teacher's own feature
    margin = (own - top_s) / temp_s - total_s.log()
    b = torch.sigmoid(total_t.log() - (1 - top_t) / temp_t)  # [B]; t.t = 1
    loss = (F.softplus(-margin) + b * (own - (x * mean_t).sum(1)) / temp_s).mean()
    if not differentiate:
        return loss, zs.new_empty(0)
    a, b = torch.sigmoid(-margin)[:, None], b[:, None]
    return loss, _through_unit((a * (mean_s - t) - b * (mean_t - t)) / (temp_s * n), x, zs)


def enqueue(queue: Tensor, ptr: Tensor, keys: Tensor):
    """See ops.enqueue."""
    # The pointer stays on the device.
    where = (ptr + torch.arange(len(keys), device=ptr.device)) % len(queue)
    queue.index_copy_(0, where, unit(keys).to(queue.dtype))
    ptr.add_(len(keys)).remainder_(len(queue))


def _column(x: Tensor, value: float) -> Tensor:
    return x.new_full((len(x), 1), value)


def _moments(
    x: Tensor, temp: Tensor, queue: Tensor, want_mean: bool, fixed: bool, cold: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of unit rows x [N,d] with temp [N,1] each: sum_j exp((s_j - top) / temp) [N], the cosine top
    [N] that was taken off, and the softmax mean of the queue's rows [N,d] (0 where the sum is)."""
    step = max(1, LOGITS // len(x))
    scratch = x.new_empty(len(x) * min(step, len(queue)))
    total = x.new_zeros(len(x))
    mean = torch.zeros_like(x) if want_mean else None
    top = x.new_full((len(x),), 1.0 if fixed else -torch.inf)
    scaled = x / temp
    bias = -1 / temp if fixed else x.new_zeros(())
    for part in queue.split(step):
        part = part.to(x.dtype)
        # [N,step]
        p = torch.addmm(bias, scaled, part.T, out=scratch[: len(x) * len(part)].view(len(x), -1))
        if not fixed:
            new = torch.maximum(top, p.amax(1) * temp[:, 0])
            shrink = torch.exp((top - new) / temp[:, 0])
            total *= shrink
            if want_mean:
                mean *= shrink[:, None]
            p -= new[:, None] / temp
            top = new
        if cold:
            # What underflows is slow, in the exponential and in the product.
            p.clamp_min_(-80 if p.dtype == torch.float32 else -700)
        p.exp_()
        total += p.sum(1)
        if want_mean:
            mean.addmm_(p, part)
    if want_mean:
        mean /= total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]
    return total, top, mean


def _through_unit(grad: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """The gradient to raw rows z of one to their unit rows x."""
    return (grad - (grad * x).sum(-1, keepdim=True) * x) / z.norm(dim=-1, keepdim=True).clamp_min(
        EPS
    )
