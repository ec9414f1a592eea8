"""A network's forward as a CUDA graph: captured once, then replayed on a stream of its own, beside
what the caller does meanwhile.

Shapes: B images on this rank, S side of an image."""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdisco.common.console import say
from fastdisco.common.errors import UserError

# Forwards before the capture.  In the first ones libraries choose their algorithms and allocate,
# which a capture must not see.
WARM_UP = 3

# Before torch 2.13 a capture that fails leaves the device's random generator and allocator in
# capture mode (pytorch pull requests 176752 and 180395).  From then on random numbers raise, and so
# do graphs that were made earlier.
RECOVERS = torch.__version__ >= "2.13"

# Views [B,3,S,S] -> a named tuple whose fields are tensors or None.
Forward = Callable[[list[Tensor]], Any]


class Later:
    """The fields of a named tuple that another stream may still be computing.

    Reading a field makes the current stream wait for it, never the host."""

    def __init__(self, out: Any, done: torch.Event) -> None:
        self._out, self._done = out, done

    def __getattr__(self, name: str) -> Any:
        x, here = getattr(self._out, name), torch.cuda.current_stream()
        here.wait_event(self._done)
        if x is not None:
            # Its memory belongs to the other stream, which must not reuse it before this stream
            # has read it.
            x.record_stream(here)
        return x


class CaptureFailed(RuntimeError):
    """CUDA refused to capture a forward that runs eagerly."""


class Capture:
    """One forward on inputs of its own as a graph, and the stream that it runs on."""

    def __init__(
        self, forward: Forward, views: list[Tensor], kept: list[Tensor], dtype: torch.dtype | None
    ) -> None:
        """The arguments are those of Graphed and of its first call.

        Raises CaptureFailed where CUDA refuses to capture what `forward` does.  What `forward`
        raises before, run eagerly, is raised as it is: memory that does not suffice, for example."""
        here, self.stream = torch.cuda.current_stream(), torch.cuda.Stream()
        self.inputs = [torch.empty_like(v, dtype=dtype).copy_(v) for v in views]
        self.out: Any = None
        before = [x.clone() for x in kept]
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream), torch.random.fork_rng([self.stream.device_index]):
            for _ in range(WARM_UP):
                forward(self.inputs)
            try:
                self.graph = torch.cuda.CUDAGraph()
                # thread_local: NCCL's and DALI's threads make CUDA calls meanwhile, and only calls
                # of this thread may break the capture.
                with (
                    _no_garbage_collection(),
                    torch.cuda.graph(
                        self.graph, stream=self.stream, capture_error_mode="thread_local"
                    ),
                ):
                    self.out = forward(self.inputs)
            except RuntimeError as e:
                raise CaptureFailed(str(e) or type(e).__name__) from e
            finally:
                for x, value in zip(kept, before):
                    x.copy_(value)
                here.wait_stream(self.stream)
        self.done = self.stream.record_event()

    def __call__(self, views: list[Tensor]) -> Later:
        here = torch.cuda.current_stream()
        # The last replay must have read its inputs before they are overwritten.
        here.wait_event(self.done)
        for mine, view in zip(self.inputs, views):
            # On the caller's stream, the only one that a loader's buffers know.
            mine.copy_(view, non_blocking=True)
        # For the inputs, and for the weights where the caller's stream has just moved them.
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            self.graph.replay()
            # Copies, since the next replay writes over the graph's own output.
            fields = [None if x is None else x.clone() for x in self.out]
            self.done = self.stream.record_event()
        return Later(type(self.out)(*fields), self.done)


class Graphed:
    """A forward that becomes a CUDA graph at its first call.

    Views of the first call's shapes are replayed; views of other shapes run eagerly on the caller's
    stream, which is said once."""

    def __init__(
        self,
        what: str,
        forward: Forward,
        kept: Iterable[Tensor] = (),
        dtype: torch.dtype | None = None,
        capture: Callable[..., Callable[[list[Tensor]], Any]] = Capture,
    ) -> None:
        """what  names the forward where it is said that it cannot be a graph
        forward  without gradient, with fixed control flow, no collective and no wait for the
                 device; its weights keep their addresses
        kept     tensors that a forward writes, such as batch-norm statistics, and that making the
                 graph must not change
        dtype    views are cast to it on their way into the graph; None: that of the first call
        capture  makes the graph"""
        self.what, self.forward, self.kept = what, forward, list(kept)
        self.dtype, self.capture = dtype, capture
        # None until the first call; the graph stays None where there can be none.
        self.shapes: list[tuple[int, ...]] | None = None
        self.graph: Callable[[list[Tensor]], Any] | None = None
        self.warned = False

    def __call__(self, views: list[Tensor]) -> Any:
        """A Later where the graph is replayed, otherwise what the forward returns.

        Raises UserError where the capture fails and torch is older than 2.13, since it cannot go
        on."""
        shapes = [tuple(v.shape) for v in views]
        if self.shapes is None:
            self.shapes = shapes
            self._make(views)
        if self.graph and shapes == self.shapes:
            return self.graph(views)
        if self.graph:
            self._warn(f"views {shapes} differ from those of its graph, {self.shapes}")
        return self.forward(views)

    def _make(self, views: list[Tensor]) -> None:
        try:
            self.graph = self.capture(self.forward, views, self.kept, self.dtype)
        except CaptureFailed as e:
            why = f"the capture failed ({' '.join(str(e).split())})"
            if not RECOVERS:
                raise UserError(
                    f"{self.what}: cannot run as a CUDA graph: {why}, after which torch "
                    f"{torch.__version__} cannot go on; set perf.graphs=false, or take torch "
                    "2.13 or later",
                    anywhere=True,
                ) from e
            self._warn(why)

    def _warn(self, why: str) -> None:
        if not self.warned:
            # From any rank: a capture may fail on one alone.
            say(f"{self.what}: runs eagerly, not as a CUDA graph: {why}", anywhere=True)
            self.warned = True


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Around a capture: a collection inside it might end an old DALI pipeline there, whose calls
    would break the capture."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def rehearsal(*networks: torch.nn.Module) -> Iterator[None]:
    """A context for forwards that are not part of the training: at its end the networks' buffers
    (batch-norm statistics) and the random streams are as they were before."""
    before = [(b, b.clone()) for net in networks for b in net.buffers()]
    cuda = torch.cuda.is_available()
    with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
        try:
            yield
        finally:
            if cuda:
                # Graphs run on streams of their own, which may still be writing the buffers.
                torch.cuda.synchronize()
            for b, value in before:
                b.copy_(value)
