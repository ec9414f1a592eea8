"""The step's runtime: torch.compile, fused optimizers, and that the loop never waits for the device
between log points."""

import copy
import importlib.util
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ranks, tiny
from test_graphs import CUDA
from test_teacher_runtime import net, views
from torch import nn
from training import _told, _train, losses, train_a_teacher

from fastdisco import config, data, models
from fastdisco.config import Optim, UserError
from fastdisco.engine import compiled, optim
from fastdisco.run import meter


@pytest.fixture(scope="module")
def distilled(folder, tmp_path_factory):
    """Overrides that distil from a run of our own, and log at every second step."""
    out = tmp_path_factory.mktemp("teacher")
    train_a_teacher(folder, out, steps=1)
    return [
        f"teacher.file={out}/teacher",
        "teacher.arch=test_resnet",
        "log.every=2",
        "run.max_steps=6",
        "data.accumulate=2",
    ]


# ---- torch.compile


def test_compiled_students_and_teachers_train_alike_and_the_price_is_told(
    folder, tmp_path, distilled
):
    def run(*more):
        return ranks(
            1,
            _told,
            tiny(
                folder,
                tmp_path,
                *distilled,
                "log.every=1",
                "run.max_steps=3",
                "data.accumulate=1",
                *more,
            ),
        )[0]

    assert "perf.compile" not in run("run.name=plain")
    text = run("run.name=both", "perf.compile=both", "perf.backend=aot_eager")
    for what in ("student", "teacher"):
        assert (
            f"perf.compile: {what} in " in text
            and text.count("ms instead of") == 2
            and text.count("paid back") == 2
        )
    plain, both = losses(tmp_path / "plain"), losses(tmp_path / "both")
    assert [both[s] for s in (1, 2, 3)] == pytest.approx(
        [plain[s] for s in (1, 2, 3)], rel=1e-5
    ) and plain[3] != plain[1]


def test_what_cannot_be_compiled_is_refused():
    small = models.Net(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 2)
    )
    with pytest.raises(
        UserError,
        match="perf.compile: the student cannot be compiled by no_such_thing .*perf.compile=false",
    ):
        compiled.compile(
            "student", small, lambda: compiled.forward_backward(small, views()), "no_such_thing"
        )
    raw = {"run": {"name": "x"}, "data": {"train": "x"}}
    with pytest.raises(UserError, match="perf.compile: both, but there is no teacher"):
        config.validate(raw | {"perf": {"compile": "both"}}, "here")
    with pytest.raises(
        UserError, match="perf.compile: teacher, but with teacher.cache=replay no teacher runs"
    ):
        config.validate(
            raw | {"perf": {"compile": "teacher"}, "teacher": {"file": "x", "cache": "replay"}},
            "here",
        )
    with pytest.raises(UserError, match="perf.compile: student works at engine.stage 0 to 2"):
        config.validate(raw | {"perf": {"compile": "student"}, "engine": {"stage": 3}}, "here")


def test_what_compiling_measures_is_no_training():
    torch.manual_seed(0)
    small = models.Net(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Dropout(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        nn.Linear(4, 2),
    )
    before = copy.deepcopy(small.state_dict())
    stream, x = torch.get_rng_state(), views()
    compiled.compile("student", small, lambda: compiled.forward_backward(small, x), "eager")
    assert torch.equal(torch.get_rng_state(), stream) and all(
        torch.equal(v, before[k]) for k, v in small.state_dict().items()
    )
    assert all(p.grad is None for p in small.parameters())
    compiled.forward_backward(small, x)
    assert not torch.equal(torch.get_rng_state(), stream) and not torch.equal(
        small.backbone[1].running_mean, before["backbone.1.running_mean"]
    )


# ---- waiting for the device

# Of a tensor's values.
READS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__contains__",
    "nonzero",
)


# By their real folders: a checkout may itself lie in a folder called fastdisco.
OURS = [
    Path(importlib.util.find_spec(name).origin).resolve().parent
    for name in ("fastdisco", "fastdisco.kernels", "deepspeed")
]


def _here():
    """(file, function) of the innermost frame of ours or DeepSpeed's."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename).resolve()
        if any(path.is_relative_to(folder) for folder in OURS):
            return path.name, frame.name
    raise AssertionError("the read comes from neither fastdisco nor DeepSpeed")


def _between_log_points(args, begin, end):
    """Trains, with begin() called before the first batch after every log point, and end() at every
    log point."""
    state, read, fetch = {"logged": False, "on": False}, meter.Meter.read, data.TrainLoader.__next__

    def at_the_log_point(self, *a):
        if state["on"]:
            end()
        state.update(logged=True, on=False)
        return read(self, *a)

    def batch(self):
        if state["logged"] and not state["on"]:
            begin()
            state["on"] = True
        return fetch(self)

    meter.Meter.read, data.TrainLoader.__next__ = at_the_log_point, batch
    _train(args)


def _reads(args):
    found, watching = set(), []

    def watched(plain):
        def call(*a, **k):
            if watching:
                found.add(_here())
            return plain(*a, **k)

        return call

    for name in READS:
        setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    torch.tensor = watched(torch.tensor)  # on a GPU, a copy from memory that is not pinned
    _between_log_points(args, lambda: watching.append(1), watching.clear)
    return sorted(found)


# Of DeepSpeed; docs/speed.md names them.
CLIPPED = [("utils.py", "is_invalid_grad_norm"), ("utils.py", "mask_nan_or_inf_with_val_inplace")]


@pytest.mark.parametrize(
    "stage, clip, where", [(0, 0, []), (0, 1, []), (1, 0, []), (2, 1, CLIPPED)]
)
def test_between_log_points_the_loop_reads_no_tensor(
    folder, tmp_path, distilled, stage, clip, where
):
    """On a CPU nothing waits, but the same calls are made as on a GPU, where each of them would."""
    assert (
        ranks(
            1,
            _reads,
            tiny(folder, tmp_path, f"engine.stage={stage}", f"optim.clip={clip}", *distilled),
        )[0]
        == where
    )


# ---- what only a GPU can tell


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw"])
def test_fused_optimizers_are_the_plain_ones(name, monkeypatch):
    def moved(fused):
        """The optimizer and the weights, after some steps along gradients that are given, since a
        GPU's own do not repeat."""
        monkeypatch.setattr(optim, "_fused", fused)
        student = net().to(CUDA)
        opt = optim.create(student, Optim(name=name, weight_decay=1e-2), 0.05)
        g = torch.Generator("cuda").manual_seed(0)
        for _ in range(4):
            for p in student.parameters():
                p.grad = torch.randn(p.shape, device=CUDA, generator=g).mul_(1e-3)
            opt.step()
        return opt, list(student.parameters())

    fused = optim._fused
    (a, x), (b, y) = moved(fused), moved(lambda *_: {})
    assert a.defaults["fused"] and not b.defaults.get("fused")
    # Adam moves each weight by about the learning rate, whatever its gradient.
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def _waits(args, mode):
    """(file, function) of every wait between log points, as torch sees them, and of calls that wait
    by their nature."""
    import warnings

    found, watching = set(), []

    def note(*a, **k):
        if watching:
            found.add(_here())

    def watched(plain, waits=lambda *a: True):
        def call(*a, **k):
            if waits(*a):
                note()
            return plain(*a, **k)

        return call

    torch.cuda.synchronize = watched(torch.cuda.synchronize)
    torch.cuda.Event.synchronize = watched(torch.cuda.Event.synchronize)
    torch.cuda.Stream.synchronize = watched(torch.cuda.Stream.synchronize)
    torch.Tensor.item = watched(torch.Tensor.item, lambda x: x.is_cuda)
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *a: note() if "synchroniz" in str(message) else None

    def begin():
        # It warns of itself.
        torch.cuda.set_sync_debug_mode(mode)
        watching.append(1)

    def end():
        torch.cuda.set_sync_debug_mode("default")
        watching.clear()

    _between_log_points(args, begin, end)
    return sorted(found)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_at_stage_0_nothing_waits_for_the_gpu_between_log_points(
    folder, tmp_path, distilled, precision
):
    for name in ("sgd", "adamw"):
        for clip in (0, 1):
            overrides = (
                f"run.name={name}{clip}",
                f"engine.precision={precision}",
                f"optim.name={name}",
                f"optim.clip={clip}",
            )
            assert (
                ranks(1, _waits, tiny(folder, tmp_path, *overrides, *distilled), "error")[0] == []
            )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "stage, clip, where", [(1, 0, []), (2, 0, []), (1, 1, CLIPPED), (2, 1, CLIPPED)]
)
def test_at_stages_1_and_2_what_waits_is_known(folder, tmp_path, distilled, stage, clip, where):
    found = ranks(
        1,
        _waits,
        tiny(folder, tmp_path, f"engine.stage={stage}", f"optim.clip={clip}", *distilled),
        "warn",
    )[0]
    print(f"stage {stage}, clip {clip}: {found}")
    assert found == where


@pytest.mark.gpu
def test_training_with_graphs_is_training_without(folder, tmp_path, distilled):
    for name, graphs in (("with", "true"), ("without", "false")):
        overrides = (
            *distilled,
            f"run.name={name}",
            f"perf.graphs={graphs}",
            "student.kwargs={}",
            "log.every=1",
            "data.accumulate=1",
        )
        ranks(1, _train, tiny(folder, tmp_path, *overrides))
    a, b = losses(tmp_path / "with"), losses(tmp_path / "without")
    assert [a[s] for s in (1, 2, 3)] == pytest.approx([b[s] for s in (1, 2, 3)], rel=2e-2)


@pytest.mark.gpu
def test_a_graph_in_the_loop_says_nothing_but_what_it_does_not_do(folder, tmp_path, distilled):
    assert "eagerly" not in ranks(1, _told, tiny(folder, tmp_path, *distilled))[0]
