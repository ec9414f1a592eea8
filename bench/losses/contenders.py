"""The contenders of bench/kernels.py.

Each takes raw rows [B,d], the key's or the teacher's raw rows [B,d] and the queue's unit rows
[K,d], and returns the loss and its gradient to the first [B,d]."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco import kernels

# MoCo's temperature; SEED's for student and teacher, the latter the coldest that a queue in
# bfloat16 allows.
TEMP, TEMP_S, TEMP_T = 0.2, 0.2, 0.01


def plain_moco(z: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """MoCo's loss as in its paper, the logits in the queue's dtype."""
    q, k = F.normalize(z, dim=1), F.normalize(key, dim=1)
    logits = (
        torch.cat([(q * k).sum(1, keepdim=True).to(queue.dtype), q.to(queue.dtype) @ queue.T], 1)
        / TEMP
    )
    return F.cross_entropy(logits.float(), torch.zeros(len(q), dtype=torch.long, device=q.device))


def plain_seed(zs: Tensor, zt: Tensor, queue: Tensor) -> Tensor:
    """SEED's loss as in its paper, the scores in the queue's dtype."""
    s, t = F.normalize(zs, dim=1), F.normalize(zt, dim=1)
    scores = lambda x: torch.cat(
        [(x * t).sum(1, keepdim=True).to(queue.dtype), x.to(queue.dtype) @ queue.T], 1
    )
    return F.cross_entropy((scores(s) / TEMP_S).float(), F.softmax((scores(t) / TEMP_T).float(), 1))


def our_moco(z: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    return kernels.info_nce(z, key, queue, TEMP)


def our_seed(zs: Tensor, zt: Tensor, queue: Tensor) -> Tensor:
    return kernels.seed(zs, zt, queue, TEMP_S, TEMP_T)


PLAIN = dict(moco=plain_moco, seed=plain_seed)
OURS = dict(moco=our_moco, seed=our_seed)


def graded(loss: Callable) -> Callable:
    """A function that returns the loss and its gradient, by autograd."""

    def call(z: Tensor, other: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        value = loss(z, other, queue)
        return value.detach(), torch.autograd.grad(value, z)[0]

    return call


@torch.no_grad()
def sdpa_moco(z: Tensor, key: Tensor, queue: Tensor, splits: int = 1) -> tuple[Tensor, Tensor]:
    """With s the positive's logit, and E and M the log-sum-exp and the softmax mean of the
    negatives: the loss is log(1 + exp(E-s)), its gradient sigmoid(E-s) (M - k) / temp."""
    q, k = F.normalize(z, dim=1), F.normalize(key, dim=1)
    lse, mean = attend(q / TEMP, queue, splits)
    margin = (q * k).sum(1) / TEMP - lse
    grad = torch.sigmoid(-margin)[:, None] * (mean - k) / (TEMP * len(q))
    return F.softplus(-margin).mean(), through_unit(grad, q, z)


@torch.no_grad()
def sdpa_seed(zs: Tensor, zt: Tensor, queue: Tensor, splits: int = 1) -> tuple[Tensor, Tensor]:
    """Student and teacher attend to the queue together, each row over its temperature; the
    teacher's own feature joins as in kernels/chunked.py."""
    s, t = F.normalize(zs, dim=1), F.normalize(zt, dim=1)
    n = len(s)
    lse, mean = attend(torch.cat([s / TEMP_S, t / TEMP_T]), queue, splits)
    own = (s * t).sum(1)
    margin, b = own / TEMP_S - lse[:n], torch.sigmoid(lse[n:] - 1 / TEMP_T)
    loss = F.softplus(-margin) + b * (own - (s * mean[n:]).sum(1)) / TEMP_S
    grad = torch.sigmoid(-margin)[:, None] * (mean[:n] - t) - b[:, None] * (mean[n:] - t)
    return loss.mean(), through_unit(grad / (TEMP_S * n), s, zs)


SDPA = dict(moco=sdpa_moco, seed=sdpa_seed)


def attend(rows: Tensor, queue: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """For rows [N,d] that are divided by their temperature: the log-sum-exp [N] of their products
    with the queue [K,d], and the softmax mean [N,d] of its rows."""
    aten = torch.ops.aten
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    if rows.is_cuda:
        flash = aten._scaled_dot_product_flash_attention
    parts = queue.view(splits, 1, -1, queue.shape[1])  # [S,1,K/S,d]
    # [S,1,N,d], [S,1,N]
    mean, lse = flash(rows.to(queue.dtype).expand(splits, 1, -1, -1), parts, parts, scale=1.0)[:2]
    if splits == 1:
        return lse[0, 0], mean[0, 0].float()
    total = lse[:, 0].logsumexp(0)
    return total, torch.einsum("sn,snd->nd", (lse[:, 0] - total).exp(), mean[:, 0].float())


def through_unit(grad: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """The gradient to raw rows z, from that to their unit rows x."""
    return (grad - (grad * x).sum(1, keepdim=True) * x) / z.norm(dim=1, keepdim=True)


def contenders(loss: str, shape: tuple[int, int, int], aimed: bool, multiprocessors: int) -> dict:
    """{name: (the queue's dtype, call)} for a shape (B, K, d)."""
    b, k, _ = shape
    # Of a flash attention's rows: SEED scores the teacher's, too.
    blocks = math.ceil((1 if loss == "moco" else 2) * b / 128)
    splits = min(1 << max(0, math.ceil(math.log2(multiprocessors / blocks))), k // 256)
    fp32, bf16, sdpa = torch.float32, torch.bfloat16, SDPA[loss]
    plain, ours = graded(PLAIN[loss]), graded(OURS[loss])
    out = {
        "ours": (bf16, ours),
        "eager fp32": (fp32, plain),
        "eager bf16": (bf16, plain),
        "sdpa": (bf16, sdpa),
    }
    if splits > 1:
        out["sdpa split"] = bf16, lambda *x: sdpa(*x, splits=splits)
    if aimed:
        out |= {
            f"compile {name}": (dtype, graded(torch.compile(PLAIN[loss], dynamic=False)))
            for name, dtype in (("fp32", fp32), ("bf16", bf16))
        }
    return out
