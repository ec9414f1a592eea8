"""Every loss in plain torch, as its paper writes it: the specification that the fast forms are tested against."""
import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temp: float) -> Tensor:
    """Cross-entropy of the query's similarities, its own key being the right class.  MoCo, arXiv:1911.05722, equation 1.

    q      [B,d] raw rows, normalised here; the gradient goes to q only
    k      [B,d] row b is the positive of q[b], normalised here
    queue  [K,d] unit rows, the negatives
    temp   > 0; divides the cosine
    Returns a scalar, the mean over B in nats; float64 if q is, else float32."""
    q, k = unit(q), unit(k.detach()).to(wide(q))
    positive = (q * k).sum(1, keepdim=True)  # [B,1]
    logits = torch.cat([positive, q @ queue.detach().to(q.dtype).T], 1) / temp  # [B,1+K]
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def distill(zs: Tensor, zt: Tensor) -> Tensor:
    """Squared distance of the student's unit rows to the teacher's.  DisCo, arXiv:2104.09124, L_dis.

    zs, zt  [V,B,d] raw rows, normalised here; the same view on both sides; the gradient goes to zs only
    Returns a scalar, the sum over V of the mean over B; float64 if zs is, else float32."""
    return (unit(zs) - unit(zt.detach()).to(wide(zs))).square().sum(-1).mean(-1).sum()


def unit(x: Tensor) -> Tensor:
    """The rows at length 1, in float64 if x is, else in float32."""
    return F.normalize(x.to(wide(x)), dim=-1)


def wide(x: Tensor) -> torch.dtype:
    """What x is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
