"""The queue losses as torch.library ops: what the dispatcher, autograd, torch.compile and CUDA
graphs see of them.

Each op returns the loss and, where it is asked for (`differentiate`), the gradient beside it, for
both come from the same pass over the queue; backward only scales.  On CUDA a width of up to 256
takes the Triton kernels, everything else chunked torch."""

import torch
from fastdisco.kernels import chunked
from fastdisco.kernels.reference import wide
from torch import Tensor

WIDEST = 256  # the accumulator of a wider row does not fit the registers


def _form(z: Tensor, queue: Tensor):
    if z.device.type != "cuda" or z.shape[-1] > WIDEST or torch.float64 in (z.dtype, queue.dtype):
        return chunked
    # Triton is no dependency of a machine without a GPU.
    from fastdisco.kernels import queue as swept

    return swept


# ---- MoCo and DisCo


@torch.library.custom_op("fastdisco::moco", mutates_args=())
def moco(
    z: Tensor, k: Tensor, t: Tensor | None, queue: Tensor, temp: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(contrast, distill) [2], and where `differentiate` contrast's gradient to z[0] [B,d] and,
    with t, distill's to z [V,B,d]; else empty."""
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
        return _form(z, queue).moco(z, k, t, queue, temp, differentiate)


@moco.register_fake
def _(z, k, t, queue, temp, differentiate):
    new = lambda shape, wanted: z.new_empty(shape if wanted else 0, dtype=wide(z))
    return (
        new(2, True),
        new(z.shape[1:], differentiate),
        new(z.shape, differentiate and t is not None),
    )


def _keep_moco(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.like = inputs[0].shape, inputs[0].dtype


def _moco_backward(ctx, upstream, *_):
    _once("moco")
    (shape, dtype), (contrast, distill) = ctx.like, ctx.saved_tensors
    if distill.numel():
        grad = distill * upstream[1]
        grad[0].addcmul_(contrast, upstream[0])
    else:
        grad = (contrast * upstream[0])[None]
        if shape[0] > 1:  # nothing was asked of the other views
            grad = torch.cat([grad, grad.new_zeros(shape[0] - 1, *shape[1:])])
    return grad.to(dtype), None, None, None, None, None


moco.register_autograd(_moco_backward, setup_context=_keep_moco)


# ---- SEED


@torch.library.custom_op("fastdisco::seed", mutates_args=())
def seed(
    zs: Tensor, zt: Tensor, queue: Tensor, temp_s: float, temp_t: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """The loss [], and where `differentiate` its gradient to zs [B,d]; else empty."""
    with torch.no_grad(), torch.autocast(zs.device.type, enabled=False), torch.cuda.device_of(zs):
        return _form(zs, queue).seed(zs, zt, queue, temp_s, temp_t, differentiate)


@seed.register_fake
def _(zs, zt, queue, temp_s, temp_t, differentiate):
    return zs.new_empty((), dtype=wide(zs)), zs.new_empty(
        zs.shape if differentiate else 0, dtype=wide(zs)
    )


def _keep_seed(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _seed_backward(ctx, upstream, _):
    _once("seed")
    return (ctx.saved_tensors[0] * upstream).to(ctx.dtype), None, None, None, None, None


seed.register_autograd(_seed_backward, setup_context=_keep_seed)


def _once(loss: str):
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            f"{loss} is differentiable once: its gradient is computed in the forward"
        )


# ---- the queue


@torch.library.custom_op("fastdisco::enqueue", mutates_args=("queue", "ptr"))
def enqueue(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    """Unit rows of keys [n,d] over queue [K,d] from row ptr on, which moves past them; n <= K."""
    with torch.cuda.device_of(queue):
        _form(keys, queue).enqueue(queue, ptr, keys)


@enqueue.register_fake
def _(queue, ptr, keys):
    return None
