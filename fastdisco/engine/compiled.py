"""torch.compile of a backbone, with a report of what it costs and what it saves.

Both are measured before the training begins."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.engine.cudagraph import rehearsal

# How many steps are timed before and after.
ROUNDS = 5


def compile(what: str, net: nn.Module, step: Callable[[], object], backend: str) -> None:
    """Compiles `net.backbone` in place, for the shapes that `step` calls it with, and prints after
    how many such steps the time spent is paid back.

    what     the network's name in what is printed
    step     what a micro batch does with the network.  It is run several times; buffers and random
             streams are then put back
    backend  of torch.compile
    Raises UserError where the backbone cannot be compiled."""
    with rehearsal(net):
        before = _seconds(step)
        begin = time.perf_counter()
        try:
            net.get_submodule("backbone").compile(backend=backend, dynamic=False)
            # The compiler runs in the first call.
            step()
        # Whatever the compiler, or the C++ compiler that it calls, trips over.
        except Exception as e:
            raise UserError(
                f"perf.compile: the {what} cannot be compiled by {backend} ({type(e).__name__}: "
                f"{' '.join(str(e).split())[:200]}); set perf.compile=false, or install what it "
                "asks for (inductor needs a C++ compiler)"
            ) from e
        _wait()
        took = time.perf_counter() - begin
        after = _seconds(step)
    if after < before:
        verdict = f"paid back after {took / (before - after):.0f} micro batches"
    else:
        verdict = "never paid back here: leave it out of perf.compile"
    say(
        f"perf.compile: {what} in {took:.1f} s; its part of a micro batch is {after * 1e3:.2f} ms "
        f"instead of {before * 1e3:.2f} ms; {verdict}"
    )


def refuse_unknown(backend: str) -> None:
    """Raises UserError for a backend that torch.compile does not know here."""
    # Those for debugging count, too.
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(
            f"perf.backend: torch.compile knows no {backend!r}; known here: {', '.join(known)}"
        )


def forward_backward(net: nn.Module, views: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Runs forward and backward of one micro batch and returns the gradients.

    They are not added to those of the weights, where an engine would take them for its own."""
    weights = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad(net(views).z.float().mean(), weights, allow_unused=True)


def _seconds(step: Callable[[], object]) -> float:
    """Mean time of a step, after two that are not timed."""
    for _ in range(2):
        step()
    _wait()
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        step()
    _wait()
    return (time.perf_counter() - begin) / ROUNDS


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
