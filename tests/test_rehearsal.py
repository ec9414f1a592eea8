"""A training step rehearsed on fake tensors of a GPU: every configuration's forward, backward, queue,
mean student (EMA), optimizer and checkpoint, without a value read, devices mixed or a memory format
lost; and each of these guards seen to bite.  docs/gpu.md says what this proves."""

from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from fake_gpu import CUDA, FakeGpu, Refused, backward
from fake_training import Rehearsal, ranks, stand_ins
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from fastdisco import config, models
from fastdisco.common import dist
from fastdisco.engine import autocast
from fastdisco.evals import knn

CONFIGS = ROOT / "configs"
FILES = sorted(
    str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml") if p.parent.name != "base"
)
# Two steps see both phases of a method: prototypes frozen and not, the codes without and with the
# queue, which is full after one step.
PHASES = {
    "swav": ["method.freeze_steps=1", "method.queue_epoch=0", "method.queue=512"],
    "dino": ["method.freeze_epochs=0"],
    "seed": [],
    "moco": [],
}
SMALL = "demo/student.yaml"
USUAL = [
    ("mobv3.yaml", "fp32"),
    ("mobv3.yaml", "fp16"),
    ("disco/r18_r50.yaml", "bf16", "optim.clip=1", "data.accumulate=2"),
    ("rkd/r18_r50.yaml", "bf16"),
    ("seed/r18_r50.yaml", "bf16", "method.contrast=1", "views=[{count: 2}]"),
    ("swav/mobv3_disco.yaml", "bf16"),
    ("dino/vit_tiny_disco.yaml", "fp16", "method.norm_last_layer=false"),
    (SMALL, "bf16", "optim.name=adamw"),
]


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    stand_ins(monkeypatch)


def load(name, precision="bf16", *more):
    raw = [f"engine.precision={precision}", *more]
    method = config.load(CONFIGS / name).method.name
    return config.load(CONFIGS / name, [*PHASES[method], *raw])


def rehearse(name, *told, steps=2):
    with (gpu := FakeGpu()):
        run = Rehearsal(gpu, load(name, *told))
        run.steps(steps)
    return gpu, run


def check(run):
    """Where everything is, and in which dtype and memory format."""
    p, at_stake = run.state, {}
    for what, net in (
        ("student", p.net),
        ("ema", p.ema),
        ("teacher", run.teacher and run.teacher.net),
    ):
        at_stake |= {f"{what}.{k}": v for k, v in (net.state_dict() if net else {}).items()}
    for name, x in at_stake.items():
        assert x.device == CUDA, name
        if x.dim() == 4:
            assert x.is_contiguous(memory_format=torch.channels_last), name
        if x.is_floating_point() and not name.startswith("teacher."):
            assert x.dtype == torch.float32, name
    for name, x in p.method.state_dict().items():
        assert not isinstance(x, Tensor) or x.device == CUDA, name
    fused = p.optimizer.defaults.get("fused")
    moved = [w for w in p.net.parameters() if w in p.optimizer.state]
    assert len(moved) == len(list(p.net.parameters()))
    for w in moved:
        for key, x in p.optimizer.state[w].items():
            if x.dim() or fused:
                assert x.device == CUDA and x.dtype == torch.float32, key
            if x.dim():
                assert x.stride() == w.stride(), key


@pytest.mark.parametrize("told", USUAL, ids=lambda told: " ".join(told[:2]))
def test_a_training_is_rehearsed(told):
    gpu, run = rehearse(*told, steps=1)
    with gpu:
        run.resume()
        run.steps(1)
    check(run)


def cases():
    """(file, precision): every file under bf16, and one of each method and architecture under the
    others."""
    found = {}
    for name in FILES:
        cfg = config.load(CONFIGS / name)
        found.setdefault((cfg.method.model_dump_json(), cfg.student.arch), name)
    some = [(name, p) for name in found.values() for p in ("fp32", "fp16")]
    return [(name, "bf16") for name in FILES] + some


@pytest.mark.slow
@pytest.mark.parametrize("name, precision", cases())
def test_every_configuration_is_rehearsed(name, precision):
    # LARS waits there: the next test.
    more = ["optim.name=sgd"] if precision == "fp16" and name.startswith("swav/") else []
    check(rehearse(name, precision, *more)[1])


def test_lars_waits_for_its_scaler_under_fp16():
    """Its scaler asks every step whether a gradient overflowed, where no fused optimizer can tell."""
    with pytest.raises(DataDependentOutputException):
        rehearse("swav/mobv3.yaml", "fp16", steps=1)


# ---- several ranks, evaluation


@pytest.mark.parametrize(
    "told",
    [
        ("disco/r18_r50.yaml", "bf16", "data.accumulate=2"),
        ("seed/r18_r50.yaml", "fp32", "method.contrast=1", "views=[{count: 2}]"),
        ("swav/mobv3.yaml", "bf16", "bn.sync=false"),
        ("dino/vit_tiny.yaml", "bf16"),
    ],
    ids=lambda told: told[0],
)
def test_a_rank_of_eight_is_rehearsed(told, monkeypatch):
    sent = ranks(monkeypatch, world=8, rank=3)
    _, run = rehearse(*told, steps=1)
    weights = sum(w.numel() for w in run.state.net.parameters())
    buckets = [len(b.flat) for b in run.state.engine.exchange.buckets]
    reduced = [n for name, n in sent if name == "reduce"]
    # A step sends all gradients once, whatever is accumulated.
    assert len(buckets) > 1 and weights <= sum(buckets) < weights + 32 * len(
        list(run.state.net.parameters())
    )
    assert [n for n in reduced if n in buckets] == buckets


def test_gradients_are_sent_while_the_backward_runs(monkeypatch):
    sent = ranks(monkeypatch, world=8, rank=0)
    with (gpu := FakeGpu()):
        run = Rehearsal(gpu, load("moco/r18.yaml"))
        finish = run.state.engine.exchange.finish
        early = []
        run.state.engine.exchange.finish = lambda: (early.append(len(sent)), finish())
        run.steps(1)
    buckets = len(run.state.engine.exchange.buckets)
    assert buckets > 4 and early == [buckets + sum(name == "gather" for name, _ in sent)]


class Images(NamedTuple):
    views: list[Tensor]
    label: Tensor


@pytest.mark.parametrize("name", [SMALL, "dino/xcit_tiny.yaml"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_knn_is_rehearsed(name, precision):
    cfg = load(name, precision)
    with (gpu := FakeGpu()), gpu.reads(1 << 20):
        net = models.of(cfg).to(CUDA, memory_format=torch.channels_last)
        encode = autocast(precision, CUDA)(net.eval().features)
        size = cfg.data.eval_size
        image = torch.empty(8, size, size, 3, device=CUDA).permute(0, 3, 1, 2)
        batches = [Images([image], torch.zeros(8, dtype=torch.int64))] * 3
        # The one value that it reads.
        assert knn.run(encode, batches, batches, classes=7, k=5) == {"knn_top1": 1 << 20}


# ---- what must not pass does not


@pytest.fixture(scope="module")
def small():
    """A rehearsal that has taken a step, for many plants."""
    with pytest.MonkeyPatch.context() as patches:
        stand_ins(patches)
        # A plant that is refused leaves its keys to the step that follows.
        return rehearse(SMALL, "bf16", "method.queue=4096", steps=1)


def plant(monkeypatch, what, run):
    """Does `what` in every step, as a method might."""
    step = run.state.method.step

    def planted(nets, views, progress):
        terms = step(nets, views, progress)
        what(next(iter(terms.values())), views[0])
        return terms

    monkeypatch.setattr(run.state.method, "step", planted)


REAL = torch.ones(3, 32, 32)
READS = DataDependentOutputException
PLANTS = {
    "item": (lambda term, view: term.item(), READS),
    "tolist": (lambda term, view: view.tolist(), READS),
    "float": (lambda term, view: float(term), READS),
    "bool": (lambda term, view: bool(term > 0), READS),
    "if any": (lambda term, view: bool(view.isnan().any()), READS),
    "nonzero": (lambda term, view: view.nonzero(), DynamicOutputShapeException),
    "mask": (lambda term, view: view[view > 0], DynamicOutputShapeException),
    "cpu": (lambda term, view: term.detach().cpu(), Refused),
    "copied to the CPU": (lambda term, view: torch.zeros(()).copy_(term.detach()), Refused),
    "numpy": (lambda term, view: term.detach().numpy(), RuntimeError),
    "CPU tensor": (lambda term, view: view + torch.ones(32, 32), Refused),
    "real tensor": (lambda term, view: view + REAL, AssertionError),
    "CPU index": (lambda term, view: view[torch.zeros(2, dtype=torch.long)], Refused),
    "CPU target": (lambda term, view: torch.zeros(32, 32).add_(view[0, 0]), Refused),
    "pageable memory": (lambda term, view: torch.ones(3).to(CUDA, non_blocking=True), Refused),
    "a list": (lambda term, view: torch.tensor([1.0, 2.0], device=CUDA), Refused),
    "pinned but waited for": (lambda term, view: torch.ones(3).pin_memory().to(CUDA), Refused),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_wait_or_mix_is_found(name, small, monkeypatch):
    what, error = PLANTS[name]
    gpu, run = small
    plant(monkeypatch, what, run)
    with gpu, pytest.raises(error):
        run.steps(1)


def test_what_does_not_wait_passes(small, monkeypatch):
    def fine(term, view):
        assert torch.ones(3).pin_memory().to(CUDA, non_blocking=True).device == CUDA
        view + torch.tensor(2.0)  # an argument of the kernel
        torch.full((3,), 2.0, device=CUDA)
        assert int(torch.tensor(3)) == 3

    gpu, run = small
    plant(monkeypatch, fine, run)
    with gpu:
        run.steps(1)


def of_views(run):
    made = run.loader.views
    run.loader.views = lambda: [v.contiguous() for v in made()]


def of_a_layer(run):
    convolution = next(m for m in run.state.net.modules() if isinstance(m, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda m, args, out: out.contiguous())


def of_a_gradient(run):
    weight = next(w for w in run.state.net.parameters() if w.dim() == 4)
    weight.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", w.grad.contiguous()))


LOST = {
    "views": of_views,
    "layer": of_a_layer,
    "student": lambda run: run.state.net.to(memory_format=torch.contiguous_format),
    "mean student": lambda run: run.state.ema.to(memory_format=torch.contiguous_format),
    "teacher": lambda run: run.teacher.net.to(memory_format=torch.contiguous_format),
    "gradient": of_a_gradient,
}


@pytest.mark.parametrize("what", LOST)
def test_a_lost_memory_format_is_found(what):
    with (gpu := FakeGpu()):
        run = Rehearsal(gpu, load(SMALL))
        LOST[what](run)
        with pytest.raises(Refused, match="not channels_last|laid out unlike"):
            run.steps(1)


def test_a_shuffle_from_memory_that_is_not_pinned_is_found(monkeypatch):
    monkeypatch.setattr(dist, "_on", lambda device, x: x.to(device))
    with pytest.raises(Refused, match="waits"):
        rehearse(SMALL)


def test_a_weight_that_the_loss_forgets_is_found():
    with (gpu := FakeGpu()):
        run = Rehearsal(gpu, load(SMALL))
        run.state.net.forgotten = torch.nn.Linear(3, 3, device=CUDA)
        with pytest.raises(AssertionError, match="does not depend on .*forgotten.weight"):
            run.steps(1)


def test_gradients_by_the_walk_are_autograds():
    """On a CPU, with values: a graph with a broadcast, a tensor used twice, another dtype and an
    autograd.Function."""
    from fastdisco.kernels import swapped

    torch.manual_seed(0)
    x, w, b = torch.randn(3, 4, 5), torch.randn(6, 5), torch.randn(6)
    leaves = [x.requires_grad_(), w.requires_grad_(), b.requires_grad_()]
    targets = torch.softmax(torch.randn(2, 4, 6), 2)
    y = torch.nn.functional.linear(x, w, b)
    loss = swapped(y.bfloat16().float() * y, targets, 0.5) + (x * x).sum()
    want = torch.autograd.grad(loss, leaves, retain_graph=True)
    backward(loss, torch.device("cpu"))
    for leaf, grad in zip(leaves, want):
        torch.testing.assert_close(leaf.grad, grad)
