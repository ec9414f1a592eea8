"""What the contenders of bench/kernels.py are measured with and against: data, the losses in float64
by pieces of the queue, and the times that no method can beat."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.contenders import TEMP, TEMP_S, TEMP_T, through_unit


def inputs(
    loss: str, b: int, k: int, d: int, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw student rows [B,d], raw key or teacher rows [B,d] at a cosine of about 0.7 to them, and a
    queue [K,d] of random directions, all in float32.

    Each eighth row of the queue is near a key or teacher row: without such rivals a cold teacher
    sees itself alone."""
    g = torch.Generator(device).manual_seed(seed)
    z, other = torch.randn(2, b, d, device=device, generator=g)
    other = F.normalize(z, dim=1) + F.normalize(other, dim=1)
    queue = F.normalize(torch.randn(k, d, device=device, generator=g), dim=1)
    near = queue[::8]
    near.mul_(0.3).add_(F.normalize(other, dim=1)[torch.arange(len(near), device=device) % b])
    return 3 * z, other, F.normalize(queue, dim=1)


@torch.no_grad()
def exact(
    loss: str, z: Tensor, other: Tensor, queue: Tensor, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, by pieces of the queue (of `rows` rows)."""
    x, y = F.normalize(z.double(), dim=1), F.normalize(other.double(), dim=1)
    own, n = (x * y).sum(1, keepdim=True), len(x)

    def beside(rows_of, positive, temp):
        """sum_j exp((s_j - positive) / temp) [B,1], and the mean row under these weights"""
        total, mean = 0.0, 0.0
        for part in queue.split(rows or max(1, (1 << 26) // n)):
            p = torch.exp((rows_of @ part.double().T - positive) / temp)
            total, mean = total + p.sum(1, keepdim=True), mean + p @ part.double()
        return total, mean / total.clamp_min(1e-300)

    if loss == "moco":
        total, mean = beside(x, own, TEMP)
        return torch.log1p(total).mean(), through_unit(
            total / (1 + total) * (mean - y) / (TEMP * n), x, z.double()
        )
    (total, mean), (total_t, mean_t) = beside(x, own, TEMP_S), beside(y, 1.0, TEMP_T)
    a, b = total / (1 + total), total_t / (1 + total_t)
    value = torch.log1p(total) + b * (own - (x * mean_t).sum(1, keepdim=True)) / TEMP_S
    return value.mean(), through_unit(
        (a * (mean - y) - b * (mean_t - y)) / (TEMP_S * n), x, z.double()
    )


def errors(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> dict[str, float]:
    """RMS(error) / RMS(reference) of loss and gradient."""
    return {
        name: float((g.double() - w).norm() / w.norm())
        for name, g, w in zip(("loss_error", "grad_error"), got, want)
    }


def floors(loss: str, b: int, k: int, d: int, ceilings: dict[str, float]) -> dict[str, float]:
    """Microseconds that no method can beat: the queue in bfloat16 and the rows through memory once,
    two matrix products, an exponential a logit."""
    work = 1 if loss == "moco" else 2  # SEED scores the teacher too
    return {
        "hbm": 1e6 * (2 * k * d + 3 * 4 * b * d) / ceilings["bytes_per_s"],
        "tensor": 1e6 * work * 4 * b * k * d / ceilings["flop_per_s"],
        "exp": 1e6 * work * b * k / ceilings["exp_per_s"],
    }
