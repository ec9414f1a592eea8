"""The queue losses as torch.library ops, which is what the dispatcher, autograd, torch.compile and
CUDA graphs see of them.

Each op returns the loss and, with `differentiate`, the gradient beside it, since both come from the
same pass over the queue; backward only scales.  On CUDA a width of up to 256 takes the Triton
kernels (queue.py) where the GPU is of sm_80 or later; everything else takes chunked torch
(chunked.py).

An op is four functions: the op, its fake (shapes alone, for torch.compile), what the forward saves,
and the backward.  Shapes: V views, B images, d embedding, K rows of the queue."""

from types import ModuleType
from typing import Any

import torch
from fastdisco.kernels import chunked, launch
from fastdisco.kernels.reference import wide
from torch import Tensor

WIDEST = 256  # the accumulator of a wider row does not fit the registers


def _form(z: Tensor, queue: Tensor) -> ModuleType:
    """The module whose functions compute the ops for these rows."""
    if z.device.type != "cuda" or z.shape[-1] > WIDEST or torch.float64 in (z.dtype, queue.dtype):
        return chunked
    if not launch.sweeps(z.device):
        return chunked
    # Imported here, since a machine without a GPU need not have Triton.
    from fastdisco.kernels import queue as triton_queue

    return triton_queue


# ---- MoCo and DisCo


@torch.library.custom_op("fastdisco::moco", mutates_args=())
def moco(
    z: Tensor, k: Tensor, t: Tensor | None, queue: Tensor, temp: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as of `fastdisco.kernels.moco`.

    Returns (contrast, distill) [2], contrast's gradient to z[0] [B,d], and distill's to z [V,B,d].
    The gradients are empty unless `differentiate`, the last also without t."""
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
        return _form(z, queue).moco(z, k, t, queue, temp, differentiate)


@moco.register_fake
def _(
    z: Tensor, k: Tensor, t: Tensor | None, queue: Tensor, temp: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    terms = z.new_empty(2, dtype=wide(z))
    contrast = z.new_empty(z.shape[1:] if differentiate else 0, dtype=wide(z))
    wanted = differentiate and t is not None
    return terms, contrast, z.new_empty(z.shape if wanted else 0, dtype=wide(z))


def _keep_moco(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.like = inputs[0].shape, inputs[0].dtype


def _moco_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    _once("moco")
    (shape, dtype), (contrast, distill) = ctx.like, ctx.saved_tensors
    if distill.numel():
        grad = distill * upstream[1]
        grad[0].addcmul_(contrast, upstream[0])
    else:
        grad = (contrast * upstream[0])[None]
        # Without t, only view 0 enters the loss.
        if shape[0] > 1:
            grad = torch.cat([grad, grad.new_zeros(shape[0] - 1, *shape[1:])])
    return grad.to(dtype), None, None, None, None, None


moco.register_autograd(_moco_backward, setup_context=_keep_moco)


# ---- SEED


@torch.library.custom_op("fastdisco::seed", mutates_args=())
def seed(
    zs: Tensor, zt: Tensor, queue: Tensor, temp_s: float, temp_t: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """Arguments as of `fastdisco.kernels.seed`.

    Returns the loss [] and its gradient to zs [B,d], empty unless `differentiate`."""
    with torch.no_grad(), torch.autocast(zs.device.type, enabled=False), torch.cuda.device_of(zs):
        return _form(zs, queue).seed(zs, zt, queue, temp_s, temp_t, differentiate)


@seed.register_fake
def _(
    zs: Tensor, zt: Tensor, queue: Tensor, temp_s: float, temp_t: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    loss = zs.new_empty((), dtype=wide(zs))
    return loss, zs.new_empty(zs.shape if differentiate else 0, dtype=wide(zs))


def _keep_seed(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _seed_backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    _once("seed")
    return (ctx.saved_tensors[0] * upstream).to(ctx.dtype), None, None, None, None, None


seed.register_autograd(_seed_backward, setup_context=_keep_seed)


def _once(loss: str) -> None:
    # Gradients are on in a backward only with create_graph=True.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{loss} is differentiable once: its gradient is computed in the forward"
        )


# ---- the queue


@torch.library.custom_op("fastdisco::enqueue", mutates_args=("queue", "ptr"))
def enqueue(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    """Writes keys [n,d] as unit rows over queue [K,d] from row ptr on, and moves ptr past them;
    n <= K."""
    with torch.cuda.device_of(queue):
        _form(keys, queue).enqueue(queue, ptr, keys)


@enqueue.register_fake
def _(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    return None
