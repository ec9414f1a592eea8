"""Every loss in plain torch, as its paper writes it, in the dtype it is given: the specification that the fast forms are tested against."""
import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temp: float) -> Tensor:
    """MoCo, arXiv:1911.05722, equation 1 and algorithm 1: cross-entropy of [q.k, q.queue] / temp with target 0, mean over B.

    q, k [B,d] raw rows; queue [K,d] unit rows; a scalar in nats."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temp  # [B,1+K]
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def distill(zs: Tensor, zt: Tensor) -> Tensor:
    """DisCo, arXiv:2104.09124: squared distance of student's and teacher's unit rows, mean over B, sum over views; zs, zt [V,B,d] raw."""
    return (F.normalize(zs, dim=2) - F.normalize(zt, dim=2)).square().sum(2).mean(1).sum()
