"""The losses that methods call, with the checks of their inputs.

Level 0: imports nothing of fastdisco.  Only this package imports Triton, and only on a GPU.
Others import the functions below; tests and benches also look at the modules:

  reference.py       every loss in plain torch, as its paper writes it: the specification
  ops.py             torch.library ops, one definition for all devices
  chunked.py         their form in torch, in chunks of the queue
  queue.py           their form in Triton, on CUDA;  triton_kernels.py its kernels
  launch.py          the table of launch configurations, launch.json
  views.py, rkd.py   losses that need no queue: SwAV's and DINO's, and relational distillation
  checks.py          what the losses refuse

Shapes: V views, B images on this rank, d embedding, K rows of the queue, P prototypes."""

import torch
from fastdisco.kernels import checks, ops, reference
from fastdisco.kernels.rkd import rkd
from fastdisco.kernels.views import swapped
from torch import Tensor

__all__ = ["distill", "enqueue", "info_nce", "moco", "rkd", "seed", "swapped"]


def moco(
    z: Tensor, k: Tensor, queue: Tensor, temp: float, t: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """MoCo's contrast and DisCo's distillation in one pass over the queue.  arXiv:1911.05722,
    equation 1, and arXiv:2104.09124, L_dis.

    z      [V,B,d] raw rows, normalised here in float32: the student's views, of which view 0 is the
           query; gradient to z only, in its dtype
    k      [B,d] raw or unit rows; k[b] is the positive of z[0,b]
    queue  [K,d] unit rows in bfloat16, float16 or float32, the negatives; may be overwritten before
           backward
    temp   > 0; divides the cosine.  On CUDA the query is rounded to the queue's dtype before the
           two are multiplied
    t      [V,B,d] raw rows, the teacher's views; None for no distillation
    Returns two float32 scalars (float64 if z is float64): `info_nce` of view 0, and `distill` of
    all views (0 without t).  An active autocast changes nothing.  Differentiable once.
    Raises ValueError when k, queue or t requires grad (they are targets), shapes or devices differ,
    temp is not positive, or the queue is not contiguous.  The first use of a queue also checks that
    its rows are unit rows."""
    if z.ndim != 3 or z.shape[1:] != k.shape:
        raise ValueError(
            f"moco: z {list(z.shape)} must be [V,B,d] and k {list(k.shape)} alike in B and d"
        )
    if t is not None and t.shape != z.shape:
        raise ValueError(
            f"moco: z {list(z.shape)} and t {list(t.shape)} differ; student and teacher must embed "
            "in one width"
        )
    checks.of_queue("moco", z, queue, dict(temp=temp), dict(k=k, queue=queue, t=t))
    differentiate = torch.is_grad_enabled() and z.requires_grad
    contrast, distance = ops.moco(z, k, t, queue, temp, differentiate)[0].unbind()
    return contrast, distance


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temp: float) -> Tensor:
    """Cross-entropy of each query's similarity to its own key against those to the queue.  MoCo,
    arXiv:1911.05722, equation 1.

    q, k   [B,d] raw rows; gradient to q only.  Everything else as in `moco`.
    Returns a float32 scalar, the mean over B in nats (float64 if q is float64)."""
    if q.shape != k.shape:
        raise ValueError(f"info_nce: q {list(q.shape)} and k {list(k.shape)} must be alike")
    return moco(q[None], k, queue, temp)[0]


def seed(
    zs: Tensor, zt: Tensor, queue: Tensor, temp_s: float = 0.2, temp_t: float = 0.01
) -> Tensor:
    """Cross-entropy of the student's similarities to the queue against the teacher's.  SEED,
    arXiv:2101.04731, equation 4.

    zs, zt  [B,d] raw rows, normalised here in float32; gradient to zs only, in its dtype.  zt[b]
            itself is one more candidate beside the queue's rows
    queue   [K,d] unit rows of the teacher; may be overwritten before backward
    temp_*  > 0; divides the cosine.  temp_t below 0.01 only with a float32 queue
    Returns a float32 scalar, the mean over B in nats (float64 if zs is float64).  Differentiable
    once.
    Raises ValueError as `moco` does, and for a temp_t that the queue's dtype cannot resolve."""
    if zs.ndim != 2 or zs.shape != zt.shape:
        raise ValueError(
            f"seed: zs {list(zs.shape)} and zt {list(zt.shape)} must be [B,d] and alike; student "
            "and teacher must embed in one width"
        )
    checks.of_queue("seed", zs, queue, dict(temp_s=temp_s, temp_t=temp_t), dict(zt=zt, queue=queue))
    if temp_t < 0.01 and queue.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"seed: temp_t is {temp_t} with a queue in {str(queue.dtype)[6:]}, whose rounding moves "
            "a cosine by some 1e-4 to 1e-3 and so the teacher's probabilities by orders of "
            "magnitude; take a float32 queue or temp_t of 0.01 and more"
        )
    differentiate = torch.is_grad_enabled() and zs.requires_grad
    return ops.seed(zs, zt, queue, temp_s, temp_t, differentiate)[0]


def distill(zs: Tensor, zt: Tensor, raw_targets: bool = False) -> Tensor:
    """Squared distance of the student's unit rows to the teacher's, same view to same view.  DisCo,
    arXiv:2104.09124.

    zs, zt       [V,B,d] raw rows, normalised here in float32; gradient to zs only, in its dtype
    raw_targets  the teacher's rows are taken as they are, as in DisCo's code for SwAV.  A row's
                 gradient is then |zt| times as long
    Returns a float32 scalar, the sum over V of the mean over B (float64 if zs is float64), within
    0..4V unless targets are raw.  An active autocast changes nothing.
    Raises ValueError when zt requires grad (detach the teacher) or the shapes differ."""
    if zs.shape != zt.shape:
        raise ValueError(
            f"distill: zs {list(zs.shape)} and zt {list(zt.shape)} differ; student and teacher "
            "must embed in one width"
        )
    checks.targets("distill", dict(zt=zt))
    with torch.autocast(zs.device.type, enabled=False):
        return reference.distill(zs, zt, raw_targets)


@torch.no_grad()
def enqueue(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    """Writes keys as unit rows into the ring buffer `queue` from row `ptr` on, and moves `ptr`.

    queue  [K,d], changed in place
    ptr    [] int64, changed in place: the row that is written next
    keys   [n,d] raw rows in any dtype
    Everything stays on the queue's device: nothing waits for it, and captured CUDA graphs may hold
    the addresses.
    Raises ValueError for more keys than rows (which of them stay would be left to chance), another
    width or another device."""
    if len(keys) > len(queue):
        raise ValueError(
            f"the queue holds {len(queue)} keys and cannot take {len(keys)} at once; enlarge "
            "method.queue or lower data.batch"
        )
    one_device = keys.device == ptr.device == queue.device
    if keys.shape[1:] != queue.shape[1:] or not one_device or not queue.is_contiguous():
        raise ValueError(
            f"enqueue: keys {list(keys.shape)} on {keys.device} do not fit a contiguous queue "
            f"{list(queue.shape)} on {queue.device}, ptr on {ptr.device}"
        )
    ops.enqueue(queue, ptr, keys)
