"""Every loss in plain torch, as its paper writes it: the specification that the fast forms are
tested against.

Shapes: V views, G of them with a target, B images, d embedding, K rows of the queue, P
prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # rows shorter than this are divided by this


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temp: float) -> Tensor:
    """Cross-entropy of the query's similarities, its own key being the right class.  MoCo,
    arXiv:1911.05722, equation 1.

    q      [B,d] raw rows, normalised here; the gradient goes to q only
    k      [B,d] row b is the positive of q[b], normalised here
    queue  [K,d] unit rows, the negatives
    temp   > 0; divides the cosine
    Returns a scalar, the mean over B in nats; float64 if q is, else float32."""
    q, k = unit(q), unit(k.detach()).to(wide(q))
    positive = (q * k).sum(1, keepdim=True)  # [B,1]
    negatives = q @ queue.detach().to(q.dtype).T  # [B,K]
    logits = torch.cat([positive, negatives], 1) / temp  # [B,1+K]
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def seed(zs: Tensor, zt: Tensor, queue: Tensor, temp_s: float, temp_t: float) -> Tensor:
    """Cross-entropy between the distributions of student and teacher over the teacher's own feature
    and the queue.  SEED, arXiv:2101.04731, equation 4.

    zs, zt  [B,d] raw rows, normalised here; the gradient goes to zs only
    queue   [K,d] unit rows
    temp_*  > 0; divides the cosine
    Returns a scalar, the mean over B in nats; float64 if zs is, else float32."""
    zs, zt = unit(zs), unit(zt.detach()).to(wide(zs))
    queue = queue.detach().to(zs.dtype)
    scores = lambda z: torch.cat([(z * zt).sum(1, keepdim=True), z @ queue.T], 1)  # [B,1+K]
    return F.cross_entropy(scores(zs) / temp_s, F.softmax(scores(zt) / temp_t, 1))


def distill(zs: Tensor, zt: Tensor, raw_targets: bool = False) -> Tensor:
    """Squared distance of the student's unit rows to the teacher's.  DisCo, arXiv:2104.09124,
    L_dis.

    zs, zt       [V,B,d] raw rows, normalised here; the same view on both sides; the gradient goes to
                 zs only
    raw_targets  zt is not normalised
    Returns a scalar, the sum over V of the mean over B; float64 if zs is, else float32."""
    targets = zt.detach() if raw_targets else unit(zt.detach())
    return (unit(zs) - targets.to(wide(zs))).square().sum(-1).mean(-1).sum()


def swapped(scores: Tensor, targets: Tensor, temp: float) -> Tensor:
    """Each of the first views' targets predicted from every other view.  SwAV, arXiv:2006.09882,
    equation 2; DINO, arXiv:2104.14294, equation 3.

    scores   [V,B,P] raw; gradient to them only
    targets  [G,B,P] probabilities, of views 0..G-1
    temp     > 0; divides the scores
    Returns a scalar, the mean over the G (V-1) pairs and B in nats."""
    dtype = wide(scores)
    terms = [
        F.cross_entropy(mine.to(dtype) / temp, target.detach().to(dtype))
        for g, target in enumerate(targets)
        for v, mine in enumerate(scores)
        if v != g
    ]
    return torch.stack(terms).mean()


def unit(x: Tensor) -> Tensor:
    """The rows scaled to length 1, in float64 if x is, else in float32."""
    return F.normalize(x.to(wide(x)), dim=-1, eps=EPS)


def wide(x: Tensor) -> torch.dtype:
    """The dtype in which x is computed: float64 if x is, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
