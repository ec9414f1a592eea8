"""Relational knowledge distillation in plain torch: distances and angles within a batch.  It needs
no queue.

Shapes: B images, d embedding."""

import torch
import torch.nn.functional as F
from fastdisco.kernels import checks
from fastdisco.kernels.reference import unit, wide
from torch import Tensor


def rkd(zs: Tensor, zt: Tensor) -> tuple[Tensor, Tensor]:
    """Distances and angles among the student's unit rows against those among the teacher's.  RKD,
    arXiv:1904.05068, equations 4 to 8.

    zs, zt  [B,d] raw rows of B >= 2 images, normalised here in float32; gradient to zs only.  The
            two may differ in d
    Returns two float32 scalars (float64 if zs is float64), means of smooth L1: over the B^2
    distances, each in units of their own network's mean distance, and over the cosines at all B^3
    triples.  An active autocast changes nothing.  Memory: holds [B,B,d] and [B,B,B].
    Raises ValueError when zt requires grad or the shapes do not fit."""
    if zs.ndim != 2 or len(zs) != len(zt) or len(zs) < 2:
        raise ValueError(
            f"rkd: zs {list(zs.shape)} and zt {list(zt.shape)} must be [B,d] of the same 2 images "
            "or more"
        )
    checks.targets("rkd", dict(zt=zt))
    with torch.autocast(zs.device.type, enabled=False):
        far_s, angle_s = _relations(unit(zs))
        far_t, angle_t = _relations(unit(zt).to(wide(zs)))
        return F.smooth_l1_loss(far_s, far_t), F.smooth_l1_loss(angle_s, angle_t)


def _relations(z: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [B,B], whose mean over pairs of two images is 1, and angles [B,B,B]: at i, the
    cosine between the directions to j and to k."""
    n = len(z)
    to = z[None] - z[:, None]  # [i,j,d]: from i to j
    apart = 1 - torch.eye(n, dtype=z.dtype, device=z.device)  # 0 on the diagonal
    # The clamp keeps the root's gradient finite where two rows are equal.
    far = to.square().sum(2).clamp(min=1e-12).sqrt() * apart
    to = F.normalize(to, dim=2)
    return far / (far.sum() / (n * (n - 1))), to @ to.transpose(1, 2)
