"""Precisions, by the names that the configuration has for them, and how float32 is computed on a
GPU.

PyTorch has two switches for TF32, whose products have 10 bits of mantissa instead of 23.  The engine
sets that of convolutions as `engine.tf32` says, and leaves that of matrix products off: losses and
kNN need all bits.  Within a network, products follow the convolutions: `in_network`, `of_network`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device, cache: bool = True) -> torch.autocast:
    """A context for forward passes that do not go through the engine: those of the mean student
    (EMA) and of evaluations.

    precision  a key of DTYPE; fp32 leaves everything as it is
    cache      keep each weight's cast copy until the context ends.  False in a CUDA graph, which
               must cast the weights again in each replay"""
    return torch.autocast(
        device.type, dtype=DTYPE[precision], enabled=precision != "fp32", cache_enabled=cache
    )


@contextlib.contextmanager
def in_network() -> Iterator[None]:
    """A context for the forward of a network: products are in TF32 where convolutions are."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def of_network(x: Tensor) -> Tensor:
    """An output of the network, the same values: from here the backward computes as `in_network`,
    to its end.

    Autograd goes through what was computed last first.  So the backward of a loss is over before it
    comes to the network's outputs."""
    if not (x.requires_grad and torch.backends.cudnn.allow_tf32):
        return x
    return _Boundary.apply(x)


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    # torch declares the arguments as *grad_outputs.
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        before = torch.backends.cuda.matmul.allow_tf32
        if not before:
            torch.backends.cuda.matmul.allow_tf32 = True
            # A private name, which DistributedDataParallel's own Python code uses, too.
            torch.autograd.Variable._execution_engine.queue_callback(_products_of_all_bits)
        return grad


def _products_of_all_bits() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
