"""A GPU without a GPU: torch's FakeTensorMode makes tensors of device cuda that have shape, strides
and dtype but no values, and operators check those as on the real device.

`FakeGpu` also refuses what a GPU would wait for or do slowly, and `backward` takes gradients through
it.  What trains on it is in fake_training.py."""

import contextlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# Layers for which a GPU wants images and weights in channels_last, by the places of these among
# their tensors.  In another format they first copy, or are several times slower.
LAYERS = {
    aten.convolution.default: slice(0, 2),
    # Not the gradient, the first: it comes as the layer above left it.
    aten.convolution_backward.default: slice(1, 3),
    aten.native_batch_norm.default: slice(0, 1),
    aten._native_batch_norm_legit.default: slice(0, 1),
    aten.max_pool2d_with_indices.default: slice(0, 1),
    aten.avg_pool2d.default: slice(0, 1),
}
# One kernel for many weights, which takes memory as it finds it.
FUSED = {aten._fused_sgd_.default, aten._fused_adam_.default, aten._fused_adamw_.default}


class Refused(AssertionError):
    """The step does what a GPU would wait for, or would do in the wrong memory format."""


class FakeGpu(FakeTensorMode):
    """Raises Refused for
    - a copy from the GPU to the host, and one to the GPU that is not asynchronous from pinned memory
    - a mix of devices that torch allows: an index on the CPU is copied, and waited for
    - a convolution, batch norm or pooling of images or weights that are not channels_last
    - a fused optimizer's step over weights whose gradient or state is laid out otherwise.

    torch itself raises FakeTensorDeviceMismatchError for other mixes of devices,
    DataDependentOutputException for a value that is read (item, bool, tolist), and
    DynamicOutputShapeException for a shape that depends on values (nonzero, a mask as index)."""

    def __init__(self):
        super().__init__()
        self.answer = None
        # (name, arguments) of our own operators, each time one is called.
        self.calls = []

    def __deepcopy__(self, memo):
        return self  # a copied network stays on this GPU

    @contextlib.contextmanager
    def reads(self, answer):
        """Around what may wait for the GPU: each value that is read from it there is this number."""
        before, self.answer = self.answer, answer
        try:
            yield
        finally:
            self.answer = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastdisco":
            self.calls.append((func._opname, args))
        if func in COPIES:
            if self.answer is None:
                _look_at_copy(func, args, kwargs)
        else:
            _look_at_devices(func, args, kwargs)
        if func in LAYERS:
            _look_at_format(func, args)
        if func in FUSED:
            _look_at_layout(func, args)
        if func is aten._local_scalar_dense.default and args[0].is_cuda and self.answer is not None:
            kind = {torch.bool: bool, torch.int64: int}.get(args[0].dtype, float)
            return kind(self.answer)
        if func is aten._fused_sgd_.default:
            return None  # torch has no form of it for fake tensors
        return super().__torch_dispatch__(func, types, args, kwargs)


def _look_at_copy(func, args, kwargs):
    late = kwargs.get("non_blocking", False)
    if func is aten.copy_.default:
        target, source = args[0].device, args[1]
        late = late or args[2:3] == (True,)
    else:
        source = args[0]
        target = torch.device(kwargs.get("device") or source.device)
    if source.device.type == target.type:
        return
    if target.type == "cpu" or not (late and getattr(source, "pinned", False)):
        raise Refused(f"{func}: {list(source.shape)} from {source.device} to {target}: waits")


def _look_at_devices(func, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    # One without dimension is a kernel's argument.
    cpu = [list(x.shape) for x in tensors if x.device.type == "cpu" and x.dim()]
    if cpu and any(x.device.type == "cuda" for x in tensors):
        raise Refused(f"{func}: mixes {cpu} of the CPU with the GPU's")


def _look_at_format(func, args):
    for x in [x for x in args if isinstance(x, Tensor)][LAYERS[func]]:
        images = x.dim() == 4 and x.device.type == "cuda"
        if images and not x.is_contiguous(memory_format=torch.channels_last):
            raise Refused(f"{func}: {list(x.shape)} of strides {x.stride()}: not channels_last")


def _look_at_layout(func, args):
    lists = [x for x in args if isinstance(x, list | tuple) and x]
    for p, *others in zip(*lists):
        for x in others:
            if x.device != p.device or (x.dim() and x.stride() != p.stride()):
                raise Refused(
                    f"{func}: {list(p.shape)}: its gradient or state is laid out unlike it"
                )


# ---- gradients


# What autograd's engine would call at the end of a backward.
FINAL = []


def backward(loss: Tensor, device: torch.device = CUDA):
    """What autograd's engine does, whose threads need a real device: calls each node of the graph
    once all gradients of its output are there.  A weight's node adds to its `grad` and calls its
    hooks.  Every gradient must be on `device`."""
    waiting, found = _uses(loss.grad_fn), {loss.grad_fn: [torch.ones_like(loss)]}
    todo = [loss.grad_fn]
    with torch.no_grad():
        while todo:
            node = todo.pop()
            grads = found.pop(node, None)
            out = (
                (None,) * len(node.next_functions) if grads is None else _call(node, grads, device)
            )
            for (child, i), grad in zip(node.next_functions, out):
                if child is None:
                    continue
                if grad is not None:
                    here = found.setdefault(child, [None] * len(child._input_metadata))
                    assert grad.device == device, (node, child, grad.device)
                    _add(here, i, grad, child)
                waiting[child] -= 1
                if not waiting[child]:
                    todo.append(child)
    while FINAL:
        FINAL.pop()()


def _uses(root) -> dict:
    """How many gradients each node of the graph waits for."""
    uses, todo = {}, [root]
    while todo:
        for child, _ in todo.pop().next_functions:
            if child is not None:
                uses[child] = uses.get(child, 0) + 1
                if uses[child] == 1:
                    todo.append(child)
    return uses


def _call(node, grads: list[Tensor | None], device: torch.device) -> tuple:
    if callable(node):
        out = node(*grads)
    else:  # of an autograd.Function, which gets zeros for what has no gradient
        zeros = lambda like: torch.zeros(tuple(like.shape), dtype=like.dtype, device=device)
        whole = [zeros(m) if g is None else g for g, m in zip(grads, node._input_metadata)]
        out = node.apply(*whole)
    return out if isinstance(out, tuple) else (out,)


def _add(grads: list[Tensor | None], i: int, grad: Tensor, node):
    """To what a node has been given; the gradient of a broadcast input is summed up."""
    want = node._input_metadata[i]
    grad = grad.sum_to_size(tuple(want.shape)).to(want.dtype)
    grads[i] = grad if grads[i] is None else grads[i] + grad
