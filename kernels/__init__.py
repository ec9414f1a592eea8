"""The losses that people call, with their checks; the one-pass form in chunked.py, the specification in reference.py."""
import torch
from torch import Tensor

from fastdisco.kernels import chunked, reference


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temp: float) -> Tensor:
    """Cross-entropy of each query's similarity to its own key against those to the queue.  MoCo, arXiv:1911.05722, equation 1.

    q      [B,d] raw rows, normalised here in float32; gradient to q only, in its dtype
    k      [B,d] raw or unit rows; k[b] is the positive of q[b]
    queue  [K,d] unit rows, the negatives; may be overwritten before backward
    temp   > 0; divides the cosine
    Returns a float32 scalar, the mean over B in nats (float64 if q is float64); an active autocast changes nothing.
    Raises ValueError when k or queue requires grad (they are the mean student's), the widths differ or temp is not positive."""
    if not temp > 0:  # nor nan
        raise ValueError(f"info_nce: temp is {temp} and must be positive")
    if q.shape != k.shape or q.shape[1:] != queue.shape[1:]:
        raise ValueError(f"info_nce: q, k {list(q.shape)}, {list(k.shape)} must be alike and as wide as queue {list(queue.shape)}")
    _targets("info_nce", k=k, queue=queue)
    with torch.autocast(q.device.type, enabled=False):
        return chunked.info_nce(q, k, queue, temp)


def distill(zs: Tensor, zt: Tensor) -> Tensor:
    """Squared distance of the student's unit rows to the teacher's, same view to same view.  DisCo, arXiv:2104.09124.

    zs, zt  [V,B,d] raw rows, normalised here in float32; gradient to zs only, in its dtype
    Returns a float32 scalar, the sum over V of the mean over B, within 0..4V (float64 if zs is float64); an active autocast changes nothing.
    Raises ValueError when zt requires grad (detach the teacher) or the shapes differ."""
    if zs.shape != zt.shape:
        raise ValueError(f"distill: zs {list(zs.shape)} and zt {list(zt.shape)} differ; student and teacher must embed in one width")
    _targets("distill", zt=zt)
    with torch.autocast(zs.device.type, enabled=False):
        return reference.distill(zs, zt)


def _targets(loss: str, **inputs: Tensor):
    for name, x in inputs.items():
        if x.requires_grad:
            raise ValueError(f"{loss}: {name} requires grad but is a target; detach it")
