"""The queue losses in torch, one chunk of the queue after the other, so that the B x K logits never
exist.  For the CPU, and on CUDA for rows that are too wide for the Triton kernels.

Shapes: V views, B images, d embedding, K rows of the queue, N = B or 2 B rows of one sweep.
Names: E is the log-sum-exp of a row's logits against the queue, M the softmax mean of the queue's
rows, `margin` a row's logit against its own positive less E."""

import torch
import torch.nn.functional as F
from fastdisco.kernels.reference import EPS, unit, wide
from torch import Tensor

# Below this temperature exp((s-1) / temp) of some cosine s is no normal float32.
COLD = 0.025
# Logits held at a time: 8 MiB in float32, which the caches hold.  Fewer lose time to start-up, more
# to memory.
LOGITS = 1 << 21


def fixed_maximum(temp: float, own: bool) -> bool:
    """Whether 1 / temp, the largest possible logit, can stand for the softmax's maximum in every
    row, so that no maximum need be searched.

    Then exp((s-1) / temp) must not vanish where it counts.  From a temperature of 0.0229 on it is a
    normal float32 for any cosine s.  `own` says that the row's own feature, with s = 1, is among
    the candidates, as for SEED's teacher: then what vanishes is below 1e-38 of the sum at any
    temperature.  Even so we take the running maximum below 0.01, where rounding s already changes
    the exponent."""
    return temp >= (0.01 if own else 0.03)


def moco(
    z: Tensor, k: Tensor, t: Tensor | None, queue: Tensor, temp: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.moco.

    With s the positive's logit, the contrast is log(1 + exp(E-s)).  The textbook form
    log(exp(s) + exp(E)) - s cancels where the negatives are far: on easy data at temp 0.03 it
    loses 5 % in float32."""
    z = z.to(wide(z))
    x, k = unit(z), unit(k).to(z.dtype)
    q = x[0]
    fixed = fixed_maximum(temp, own=False)
    total, top, mean = _moments(q, _column(q, temp), queue, differentiate, fixed, temp < COLD)
    margin = ((q * k).sum(1) - top) / temp - total.log()  # [B]: s - E
    terms = torch.stack([-F.logsigmoid(margin).mean(), margin.new_zeros(())])

    contrast, distill = z.new_empty(0), z.new_empty(0)
    if differentiate:
        share = torch.sigmoid(-margin)[:, None]  # [B,1]: the negatives' part of the softmax
        contrast = _through_unit(share * (mean - k) / (temp * len(q)), q, z[0])
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
    column_s, column_t = _column(x, temp_s), _column(t, temp_t)
    if differentiate:
        # One sweep over student and teacher, stacked.
        rows, temps = torch.cat([x, t]), torch.cat([column_s, column_t])
        both = _moments(rows, temps, queue, True, fixed, cold)
        (total_s, total_t), (top_s, top_t), (mean_s, mean_t) = [v.split(n) for v in both]
    else:
        # Without a gradient the student needs no mean row, which halves its work.
        total_s, top_s, mean_s = _moments(x, column_s, queue, False, fixed, cold)
        total_t, top_t, mean_t = _moments(t, column_t, queue, True, fixed, cold)

    own = (x * t).sum(1)  # [B]: the student's cosine to the teacher's own feature
    margin = (own - top_s) / temp_s - total_s.log()
    b = torch.sigmoid(total_t.log() - (1 - top_t) / temp_t)  # [B]; the teacher's cosine t.t is 1
    loss = (F.softplus(-margin) + b * (own - (x * mean_t).sum(1)) / temp_s).mean()
    if not differentiate:
        return loss, zs.new_empty(0)
    a, b = torch.sigmoid(-margin)[:, None], b[:, None]
    return loss, _through_unit((a * (mean_s - t) - b * (mean_t - t)) / (temp_s * n), x, zs)


def enqueue(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    """See ops.enqueue."""
    # Computed on the device, where the pointer stays.
    rows = (ptr + torch.arange(len(keys), device=ptr.device)) % len(queue)
    queue.index_copy_(0, rows, unit(keys).to(queue.dtype))
    ptr.add_(len(keys)).remainder_(len(queue))


def _column(x: Tensor, value: float) -> Tensor:
    """The value for each row of x, [N,1]."""
    return x.new_full((len(x), 1), value)


def _moments(
    x: Tensor, temp: Tensor, queue: Tensor, want_mean: bool, fixed: bool, cold: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One sweep of the queue, whose rows have cosines s_j to a row of x.

    x     [N,d] unit rows
    temp  [N,1]
    Returns sum_j exp((s_j - top) / temp) [N]; top [N], the cosine that was subtracted, 1 where the
    maximum is `fixed`; and the softmax mean of the queue's rows [N,d], 0 where the sum is, empty
    unless wanted."""
    step = max(1, LOGITS // len(x))
    scratch = x.new_empty(len(x) * min(step, len(queue)))
    total = x.new_zeros(len(x))
    mean = torch.zeros_like(x) if want_mean else x.new_empty(0)
    top = x.new_full((len(x),), 1.0 if fixed else -torch.inf)
    scaled = x / temp
    bias = -1 / temp if fixed else x.new_zeros(())
    for part in queue.split(step):
        part = part.to(x.dtype)
        # [N,step], in the same memory for every chunk
        logits = scratch[: len(x) * len(part)].view(len(x), -1)
        p = torch.addmm(bias, scaled, part.T, out=logits)
        if not fixed:
            # What was summed so far shrinks to the new maximum, as in an online softmax.
            new = torch.maximum(top, p.amax(1) * temp[:, 0])
            shrink = torch.exp((top - new) / temp[:, 0])
            total *= shrink
            if want_mean:
                mean *= shrink[:, None]
            p -= new[:, None] / temp
            top = new
        if cold:
            # Denormal numbers are slow, in the exponential and in the product.
            p.clamp_min_(-80 if p.dtype == torch.float32 else -700)
        p.exp_()
        total += p.sum(1)
        if want_mean:
            mean.addmm_(p, part)
    if want_mean:
        # A sum that underflowed to 0 gives a mean row of 0.
        mean /= total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]
    return total, top, mean


def _through_unit(grad: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """The gradient to raw rows z, from the gradient to their unit rows x."""
    tangent = grad - (grad * x).sum(-1, keepdim=True) * x
    return tangent / z.norm(dim=-1, keepdim=True).clamp_min(EPS)
