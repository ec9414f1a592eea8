"""Networks as CUDA graphs: what becomes one and what does not, how a replay is ordered, and a
rehearsal that leaves no trace."""

import contextlib
import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_teacher_runtime import net, views

from fastdisco import config, methods, models
from fastdisco.config import UserError
from fastdisco.engine import cudagraph
from fastdisco.engine.cudagraph import Graphed, rehearsal
from fastdisco.methods import Nets, moco
from fastdisco.models import Out
from fastdisco.run import students
from fastdisco.teacher import Options, Teacher

CUDA = torch.device("cuda")


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(cudagraph, "say", lambda text, anywhere=False: lines.append(text))
    return lines


# ---- which calls are replays


class Replays:
    """Stands in for a capture: notes what it was made of and called with."""

    def __init__(self, forward, views, kept, dtype):
        self.made, self.calls = [v.shape for v in views], 0

    def __call__(self, views):
        self.calls += 1
        assert [v.shape for v in views] == self.made
        return "replayed"


def test_the_first_calls_shapes_are_replayed_and_another_is_said_once_and_run_eagerly(said):
    f = Graphed("teacher", lambda views: [len(v) for v in views], capture=Replays)
    assert f(views(2, 4)) == f(views(2, 4, seed=5)) == "replayed" and not said
    assert f(views(2, 3)) == [3, 3] and f(views(1, 4)) == [4] and f(views(2, 4, size=16)) == [4, 4]
    assert f(views(2, 4)) == "replayed" and f.graph.calls == 3
    assert said == [
        "teacher: runs eagerly, not as a CUDA graph: views [(3, 3, 32, 32), (3, 3, 32, 32)] differ "
        "from those of its graph, [(4, 3, 32, 32), (4, 3, 32, 32)]"
    ]


@pytest.mark.parametrize("recovers", [True, False])
def test_a_capture_that_fails_is_said_once_with_its_reason_and_not_tried_again(
    said, monkeypatch, recovers
):
    monkeypatch.setattr(cudagraph, "RECOVERS", recovers)
    tries = []

    def fails(*args):
        tries.append(args)
        raise cudagraph.CaptureFailed("operation not permitted\nwhen stream is capturing")

    f = Graphed("mean student", lambda views: [len(v) for v in views], capture=fails)
    if not recovers:
        with pytest.raises(
            UserError,
            match="mean student.*operation not permitted when stream is capturing.*perf.graphs=false",
        ):
            f(views(2, 4))
        return
    assert (
        f(views(2, 4)) == f(views(2, 4)) == [4, 4] and f(views(2, 3)) == [3, 3] and len(tries) == 1
    )
    assert said == [
        "mean student: runs eagerly, not as a CUDA graph: the capture failed (operation not "
        "permitted when stream is capturing)"
    ]


def test_keys_that_another_stream_computes_are_not_waited_for_before_the_students_forward(
    monkeypatch,
):
    class Unread(cudagraph.Later):
        def __getattr__(self, name):
            read.append(name)
            return self._out

    read, z = [], torch.randn(4, 16)
    monkeypatch.setattr(moco.dist, "world", lambda: 2)
    monkeypatch.setattr(moco.dist, "all_gather_async", lambda x: lambda: torch.cat([x, x]))
    keys = moco.encode(lambda views: Unread([z], None), views(1, 4)[0], "off", 0)
    assert not read and torch.equal(keys.every(), torch.cat([z, z])) and read == ["z"]


def test_an_error_of_the_forward_itself_is_not_swallowed(said):
    def capture(forward, views, *_):
        forward(views)

    with pytest.raises(ValueError, match="does not split"):
        Graphed(
            "mean student",
            lambda views: models.split_bn(x := net(), 3) or x.train()(views),
            capture=capture,
        )(views(1, 4))


class Streams:
    """As much of torch.cuda as Capture uses, on a CPU: work is done where it is queued, and `order`
    notes what waited for what."""

    def __init__(self, monkeypatch):
        self.order, self.now = [], "caller"
        outer, fakes = self, contextlib.nullcontext()

        class Stream:
            device_index = 0

            def __init__(self, name="graph"):
                self.name = name

            def wait_stream(self, other):
                outer.order.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                outer.order.append(f"{self.name} waits for {event}")

            def record_event(self):
                return f"the {self.name}'s event"

        @contextlib.contextmanager
        def on(stream):
            before, outer.now = outer.now, stream.name
            yield
            outer.now = before

        class Graph:
            def replay(self):
                outer.order.append(f"replay on {outer.now}")
                for mine, new in zip(self.capture.out, self.capture.forward(self.capture.inputs)):
                    if mine is not None:
                        mine.copy_(new)

        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(self.now))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(
            torch.cuda, "graph", lambda graph, stream, capture_error_mode: on(stream)
        )
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fakes)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda x, s: outer.order.append(f"{s.name} holds")
        )


def test_a_replay_is_ordered_with_its_caller_and_keeps_nothing_of_it(monkeypatch):
    streams, total = Streams(monkeypatch), torch.zeros(())

    def forward(views):
        total.add_(1)  # a statistic
        return Out(torch.stack([v.mean((1, 2, 3)) for v in views])[..., None], None)

    x, y = views(2, 4), views(2, 4, seed=5)
    captured = cudagraph.Capture(forward, x, [total], torch.float64)
    captured.graph.capture, captured.forward = captured, forward
    # Three warm-ups and the capture are undone.
    assert total == 0 and captured.inputs[0].dtype == torch.float64
    assert streams.order == ["graph waits for caller", "caller waits for graph"]
    streams.order.clear()
    first, second = captured(x), captured(y)
    assert streams.order == 2 * [
        "caller waits for the graph's event",
        "graph waits for caller",
        "replay on graph",
    ]
    streams.order.clear()
    # The second replay has not written over what the first gave.
    for later, sent in ((first, x), (second, y)):
        torch.testing.assert_close(
            later.z, torch.stack(sent).double().mean((2, 3, 4))[..., None], rtol=1e-6, atol=1e-8
        )
    assert (
        streams.order == 2 * ["caller waits for the graph's event", "caller holds"]
        and first.scores is None
        and total == 2
    )


# ---- rehearsing


def test_a_rehearsal_leaves_statistics_and_random_streams():
    student = net("test_efficientnet", drop_rate=0.5).train()
    before = copy.deepcopy(student.state_dict())
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)

    def fails():
        student(views())
        assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())
        raise KeyError

    # An error that the caller may catch changes nothing of that.
    with pytest.raises(KeyError), rehearsal(student):
        fails()
    with rehearsal(student):
        student(views())
    assert torch.equal(torch.rand(4), want)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_rehearsed_step_makes_the_graphs_that_training_replays_and_changes_nothing(with_teacher):
    student = net("test_efficientnet").train()
    ema, teacher = models.ema_copy(student), Teacher(net())
    method = methods.create("moco", cfg=config.Moco(queue=24), dim=16, seed=0, shuffle="gather")
    state = copy.deepcopy([method.state_dict(), ema.state_dict()])
    graphs = [
        Graphed(what, forward, capture=Replayed)
        for what, forward in (("mean student", torch.no_grad()(ema)), ("teacher", teacher.eager))
    ]
    nets = Nets(torch.no_grad()(copy.deepcopy(ema)), graphs[0], graphs[1] if with_teacher else None)
    students.rehearse(nets, ema, method, views(2, 4))
    assert method.keys == [] and str([method.state_dict(), ema.state_dict()]) == str(state)
    for x, y in zip(state, [method.state_dict(), ema.state_dict()]):
        assert all(torch.equal(x[k], y[k]) for k in x)
    terms = method.step(
        nets._replace(student=student), views(2, 4, seed=7), methods.Progress(5, 0.5)
    )
    assert ("distill" in terms) == with_teacher
    assert [g.graph and g.graph.calls for g in graphs] == [2, 2 if with_teacher else None]


class Replayed(Replays):
    def __init__(self, forward, *args):
        super().__init__(forward, *args)
        self.forward = forward

    def __call__(self, views):
        super().__call__(views)
        return self.forward(views)


# ---- what only a GPU can tell


def cuda(*tensors):
    return [x.to(CUDA, memory_format=torch.channels_last) for x in tensors]


def busy():
    """Some milliseconds of work on the current stream, so that what should have waited for it
    shows."""
    x = torch.randn(4096, 4096, device=CUDA)
    for _ in range(10):
        x = x @ x * 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how", [dict(fold=True), dict(fold=True, dtype=torch.float16), dict(bn_group=4)], ids=str
)
def test_a_graphed_teacher_equals_the_eager_one_over_many_steps(said, how):
    graphed, eager = (
        Teacher(net("resnet18"), Options(CUDA, graph=g, **how)) for g in (True, False)
    )
    kept, want = [], []
    for seed in range(12):
        x = cuda(*views(2, 8, 64, seed))
        busy()
        later = graphed(x)
        for v in x:
            v.mul_(3)  # the loader may write over its buffers as soon as the call has returned
        busy()
        kept.append(later.z)
        want.append(eager(cuda(*views(2, 8, 64, seed))).z)
    # Also those of earlier replays.
    torch.testing.assert_close(torch.stack(kept), torch.stack(want), rtol=1e-3, atol=1e-3)
    assert not said and graphed.forward.graph and (kept[0] - kept[1]).abs().max() > 0.05


@pytest.mark.gpu
def test_fp16_is_near_the_eager_teacher_in_fp32():
    torch.backends.cudnn.allow_tf32 = False
    for arch, bn in (("resnet50", False), ("resnet18", True), ("test_efficientnet", True)):
        plain, x = net(arch, bn).to(CUDA), cuda(*views(2, 32, 128))
        t = Teacher(net(arch, bn), Options(CUDA, torch.float16, True, graph=True, sizes=(128,)))
        with torch.no_grad():
            want = plain(x).z
        assert F.cosine_similarity(t(x).z, want, dim=-1).min() >= 0.9995
        assert F.cosine_similarity(t([v.half() for v in x]).z, want, dim=-1).min() >= 0.9995


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graphed_mean_student_equals_the_eager_one_and_its_statistics(said, precision, groups):
    pair = [
        net("test_efficientnet").train().to(CUDA, memory_format=torch.channels_last)
        for _ in range(2)
    ]
    for s in pair:
        models.split_bn(s, groups)
        s.requires_grad_(False)
    cfg = config.validate(
        {"run": {"name": "x"}, "data": {"train": "x"}, "engine": {"precision": precision}}, "here"
    )
    graphed, eager = (students.inference(s, cfg, CUDA) for s in pair)
    graphed = Graphed("mean student", graphed, pair[0].buffers())
    other = net("test_efficientnet").to(CUDA)
    near = dict(rtol=1e-4, atol=1e-4) if precision == "fp32" else dict(rtol=5e-2, atol=5e-2)
    for seed in range(6):
        x = cuda(*views(1, 8, 64, seed))
        a = graphed(x)
        busy()
        torch.testing.assert_close(a.z, eager(x).z, **near)
        for s in pair:
            models.ema_update(s, other, 0.9)  # in place: the next replay reads the same addresses
    for (name, a), (_, b) in zip(pair[0].named_buffers(), pair[1].named_buffers()):
        assert torch.equal(a, b) if "num" in name else torch.allclose(a, b, **near), name
    assert not said and int(pair[0].get_buffer("backbone.bn1.num_batches_tracked")) == 6


@pytest.mark.gpu
def test_another_shape_and_a_forward_that_waits_run_eagerly(said):
    t = Teacher(net("resnet18"), Options(CUDA, fold=True, graph=True))
    x, few = cuda(*views(2, 8, 64)), cuda(*views(2, 3, 64))
    torch.testing.assert_close(t(x).z[:, :3], t([v[:3] for v in x]).z, rtol=1e-3, atol=1e-3)
    t(few), t(x)
    assert len(said) == 1 and "(3, 3, 64, 64)" in said[0]

    # The failing capture would spoil the device for every test after this one.
    if not cudagraph.RECOVERS:
        return

    class Sum(NamedTuple):
        z: torch.Tensor

    f = Graphed("test", lambda views: Sum(views[0].sum() * (1 if views[0].sum().item() else 2)))
    torch.testing.assert_close(f(x).z, x[0].sum())
    assert (
        len(said) == 2 and "test: runs eagerly, not as a CUDA graph: the capture failed" in said[1]
    )
    # Generator and allocator still work.
    assert torch.rand(4, device=CUDA).max() < 1 and torch.isfinite(t(x).z).all()


@pytest.mark.gpu
def test_dropout_in_a_graph_draws_anew_and_from_the_seed():
    class Drop(NamedTuple):
        z: torch.Tensor

    x = [torch.ones(64, 1, 1, 64, device=CUDA)]
    f = Graphed("test", lambda views: Drop(F.dropout(views[0])))
    with rehearsal():
        # Reading it waits for the capture.
        assert f(x).z.shape == x[0].shape
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(torch.stack([f(x).z for _ in range(2)]))
    assert torch.equal(*draws) and not torch.equal(draws[0][0], draws[0][1])
