"""A network's forward as a CUDA graph: captured once, then replayed on a stream of its own beside
the caller's."""

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastdisco.common.console import say
from fastdisco.common.errors import UserError

# Forwards before the capture: libraries choose their algorithms and allocate in the first ones.
WARM_UP = 3

# Before, a capture that fails leaves the random generator and the allocator of the device in it
# (pytorch pull requests 176752 and 180395): from then on random numbers, and graphs that were made
# earlier, raise.
RECOVERS = torch.__version__ >= "2.13"

Forward = Callable[[list[Tensor]], tuple]  # views [B,3,S,S] -> a named tuple of tensors or None


class Later:
    """The fields of a named tuple that another stream still computes: reading one makes the current
    stream wait for it, never the host."""

    def __init__(self, out: tuple, done: torch.cuda.Event):
        self._out, self._done = out, done

    def __getattr__(self, name: str):
        x, here = getattr(self._out, name), torch.cuda.current_stream()
        here.wait_event(self._done)
        if x is not None:
            # Its memory is the other stream's, which may not have it back before this one has read
            # it.
            x.record_stream(here)
        return x


class Capture:
    """One forward on static inputs as a graph, and the stream that it runs on."""

    def __init__(
        self, forward: Forward, views: list[Tensor], kept: list[Tensor], dtype: torch.dtype | None
    ):
        """See Graphed.  Raises RuntimeError where CUDA refuses to capture what `forward` does, and
        what forward itself raises."""
        here, self.stream = torch.cuda.current_stream(), torch.cuda.Stream()
        self.inputs = [torch.empty_like(v, dtype=dtype).copy_(v) for v in views]
        before = [x.clone() for x in kept]
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream), torch.random.fork_rng([self.stream.device_index]):
            for _ in range(WARM_UP):
                forward(self.inputs)
            try:
                self.graph = torch.cuda.CUDAGraph()
                # The threads of NCCL and DALI make CUDA calls of their own: only this one's may
                # spoil the capture.
                with torch.cuda.graph(
                    self.graph, stream=self.stream, capture_error_mode="thread_local"
                ):
                    self.out = forward(self.inputs)
            finally:
                for x, value in zip(kept, before):
                    x.copy_(value)
                here.wait_stream(self.stream)
        self.done = self.stream.record_event()

    def __call__(self, views: list[Tensor]) -> Later:
        here = torch.cuda.current_stream()
        here.wait_event(self.done)  # the last replay has read its inputs
        for mine, view in zip(self.inputs, views):
            # On the caller's stream, the only one that a loader's buffers know.
            mine.copy_(view, non_blocking=True)
        self.stream.wait_stream(here)  # also for the weights, if they have moved
        with torch.cuda.stream(self.stream):
            self.graph.replay()
            # The next replay writes over the graph's own.
            out = type(self.out)(*(x if x is None else x.clone() for x in self.out))
            self.done = self.stream.record_event()
        return Later(out, self.done)


class Graphed:
    """`forward`, from its first call on as a CUDA graph for views of that call's shapes; others run
    eagerly on the caller's stream."""

    def __init__(
        self,
        what: str,
        forward: Forward,
        kept: Iterable[Tensor] = (),
        dtype: torch.dtype | None = None,
        capture=Capture,
    ):
        """what   names it where it cannot be a graph, which is said once (UserError before torch
                  2.13, which cannot go on)
        forward  without gradient, of fixed control flow, with no collective and no wait for the
                 device; its weights keep their addresses
        kept     tensors that a forward writes, batch-norm statistics for example, which making the
                 graph must not change
        dtype    views are cast to it on their way into the graph; None: that of the first call"""
        self.what, self.forward, self.kept, self.dtype, self.capture = (
            what,
            forward,
            list(kept),
            dtype,
            capture,
        )
        self.shapes = self.graph = None
        self.warned = False

    def __call__(self, views: list[Tensor]) -> tuple | Later:
        shapes = [tuple(v.shape) for v in views]
        if self.shapes is None:
            self.shapes = shapes
            try:
                self.graph = self.capture(self.forward, views, self.kept, self.dtype)
            except RuntimeError as e:
                why = f"the capture failed ({' '.join(str(e).split()) or type(e).__name__})"
                if not RECOVERS:
                    raise UserError(
                        f"{self.what}: cannot run as a CUDA graph: {why}, after which torch "
                        f"{torch.__version__} cannot go on; set perf.graphs=false, or take torch "
                        "2.13 or later",
                        anywhere=True,
                    ) from e
                self._warn(why)
        if self.graph and shapes == self.shapes:
            return self.graph(views)
        if self.graph:
            self._warn(f"views {shapes} differ from those of its graph, {self.shapes}")
        return self.forward(views)

    def _warn(self, why: str):
        if not self.warned:
            # A capture may fail on one rank alone.
            say(f"{self.what}: runs eagerly, not as a CUDA graph: {why}", anywhere=True)
            self.warned = True


@contextlib.contextmanager
def rehearsal(*networks: torch.nn.Module):
    """Around forwards that are no training: leaves the networks' buffers (batch-norm statistics)
    and the random streams as they were."""
    before = [(b, b.clone()) for net in networks for b in net.buffers()]
    cuda = torch.cuda.is_available()
    with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
        try:
            yield
        finally:
            if cuda:
                torch.cuda.synchronize()  # graphs run on streams of their own
            for b, value in before:
                b.copy_(value)
