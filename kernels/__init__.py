"""The losses that methods call: raw head outputs in, scalars out, the queue's logits never in memory."""
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco.kernels.chunked import InfoNCE


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temp: float) -> Tensor:
    """Cross-entropy of each query's positive key against the queue.  MoCo, arXiv:1911.05722, equation 1.

    q, k   [B,d] raw rows, normalised here in float32 (float64 if q is); gradient to q only
    queue  [K,d] unit rows, read once and not kept: it may be overwritten as soon as this returns
    temp   > 0; divides the cosine
    Returns a scalar of that dtype, the mean over B in nats; differentiable once.
    Raises ValueError when k or queue requires grad, widths differ, or temp is not positive."""
    _check(q.shape[1:] == k.shape[1:] == queue.shape[1:] and len(q) == len(k), f"q {_dims(q)}, k {_dims(k)} and queue {_dims(queue)} do not fit")
    _check(not (k.requires_grad or queue.requires_grad), "k and queue take no gradient: detach them")
    _check(temp > 0, f"temp {temp} is not positive")
    q, k = _unit(q), _unit(k)
    with torch.autocast(q.device.type, enabled=False):
        return InfoNCE.apply(q, k.to(q.dtype), queue.to(q.dtype), temp)


def distill(zs: Tensor, zt: Tensor) -> Tensor:
    """||s - t||^2 of the student's and the teacher's unit rows: mean over B, sum over views.  DisCo, arXiv:2104.09124.

    zs, zt  [V,B,d] raw rows, normalised here in float32 (float64 if zs is); gradient to zs only
    Returns a scalar of that dtype, 0..4V.
    Raises ValueError when zt requires grad (detach the teacher) or the shapes differ."""
    _check(zs.shape == zt.shape, f"zs {_dims(zs)} and zt {_dims(zt)} differ")
    _check(not zt.requires_grad, "zt takes no gradient: detach the teacher")
    s = _unit(zs)
    return (s - _unit(zt).to(s.dtype)).square().sum(-1).mean(-1).sum()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.double() if x.dtype == torch.float64 else x.float(), dim=-1)


def _check(right: bool, message: str):
    if not right:
        raise ValueError(message)


def _dims(x: Tensor) -> list[int]:
    return list(x.shape)
