"""torch.compile of a backbone; what it costs and what it saves is measured before training
begins."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.engine.cudagraph import rehearsal

ROUNDS = 5  # timed, of either form


def compile(what: str, net: nn.Module, step: Callable[[], object], backend: str):
    """Compiles net.backbone in place, for the shapes that `step` calls it with, and tells after how
    many such steps that has paid.

    step  what a micro batch does with the net; its buffers and the random streams are left as they
          were.
    Raises UserError where it cannot be compiled."""
    with rehearsal(net):
        before = _seconds(step)
        begin = time.perf_counter()
        try:
            net.backbone.compile(backend=backend, dynamic=False)
            step()
        except Exception as e:  # whatever the compiler, or the C++ compiler below it, trips over
            raise UserError(
                f"perf.compile: the {what} cannot be compiled by {backend} ({type(e).__name__}: "
                f"{' '.join(str(e).split())[:200]}); set perf.compile=false, or install what it "
                "asks for (inductor needs a C++ compiler)"
            ) from e
        _wait()
        took = time.perf_counter() - begin
        after = _seconds(step)
    gain = (
        f"paid back after {took / (before - after):.0f} micro batches"
        if after < before
        else "never paid back here: leave it out of perf.compile"
    )
    say(
        f"perf.compile: {what} in {took:.1f} s; its part of a micro batch is {after * 1e3:.2f} ms "
        f"instead of {before * 1e3:.2f} ms; {gain}"
    )


def forward_backward(net: nn.Module, views: Sequence[Tensor]) -> tuple:
    """The gradients of one micro batch, handed back instead of added to those of the weights, where
    an engine would see them."""
    weights = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad(net(views).z.float().mean(), weights, allow_unused=True)


def _seconds(step: Callable[[], object]) -> float:
    for _ in range(2):
        step()
    _wait()
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        step()
    _wait()
    return (time.perf_counter() - begin) / ROUNDS


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
