"""Configurations that can be read but cannot be meant: numbers that are none, losses without weight,
schedules that rise.  What only a run could find is refused by --dry-run, too."""

import pytest
import torch
from conftest import ranks, tiny
from test_config import BASE, error, load
from test_plan import dry
from torch import nn
from training import _fails

from fastdisco import config
from fastdisco.models import build

NUMBERS = (
    *("optim.lr", "optim.momentum", "optim.weight_decay", "optim.weight_decay_end", "optim.clip"),
    *("optim.warmup_epochs", "optim.lr_min", "engine.bucket_mb", "data.hw_decoder_load"),
    *("method.temp", "method.momentum", "method.contrast", "method.distill", "method.rkd.angle"),
    *("eval.temp", "view.flip_p"),
)


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_is_finite_and_no_bool(tmp_path, key):
    for value in (".inf", "-.inf", ".nan", "inf", "1e39", "5e-324", "true", "false"):
        assert key in error(tmp_path, BASE, f"{key}={value}"), value


@pytest.mark.parametrize(
    "override",
    [
        *("view.mean=[.inf, 0, 0]", "view.std=[1, .nan, 1]", "view.scale=[0.1, true]"),
        *("view.jitter=[0.4, 0.4, 1e300, 0.1]", "views=[{count: 2, ratio: [.inf, .inf]}]"),
        *("views=[{count: true}, {}]", "students=[{lr: .inf}, {arch: resnet18}]"),
        *("students=[{lr: true}, {arch: resnet18}]", "engine.stage=true", "engine.stage=false"),
        *("run.epochs=true", "run.seed=false", "run.max_steps=true", "eval.bank=true"),
        *("optim.milestones=[true]", "data.batch=9223372036854775807", "log.every=1e300"),
        *("method.queue=99999999999999999999", "optim.milestones=[-99999999999999999999]"),
    ],
)
def test_so_are_numbers_in_lists_and_blocks(tmp_path, override):
    assert override.split("=")[0] in error(tmp_path, BASE, override)


def test_zero_and_whole_numbers_stay_what_they_are(tmp_path):
    cfg = load(tmp_path, BASE, "optim.clip=0", "optim.lr=1", "run.epochs=1e2", "perf.compile=false")
    assert cfg.optim.lr == 1 and cfg.run.epochs == 100 and cfg.perf.compile is False
    assert load(tmp_path, BASE, "teacher={file: x, cache: off}").teacher.cache == "off"


SEED = ("method.name=seed", "teacher.file=/t")


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.contrast=0",),
        ("method.contrast=0", "teacher.file=/t", "method.distill=0"),
        ("method.contrast=0", "method.rkd={distance: 1, angle: 1}"),
        (*SEED, "method.distill=0"),
    ],
)
def test_a_training_without_a_loss_is_refused(tmp_path, overrides):
    says = error(tmp_path, BASE, *overrides)
    assert "every loss" in says and "method." in says, says


def test_one_loss_is_enough(tmp_path):
    relational = ("teacher.file=/t", "method.distill=0", "method.rkd.angle=1")
    for overrides in (("teacher.file=/t",), relational):
        load(tmp_path, BASE, "method.contrast=0", *overrides)
    load(tmp_path, BASE, *SEED)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.lr_min=0.1",),
        ("optim.lr_min=0.02", "optim.lr_scale=linear", "data.batch=128"),
        ("optim.lr_min=0.01", "students=[{lr: 0.005}, {arch: resnet18}]"),
    ],
)
def test_a_cosine_does_not_rise(tmp_path, overrides):
    says = error(tmp_path, BASE, *overrides)
    assert "optim.lr_min" in says and "above" in says, says
    load(tmp_path, BASE, "optim.lr_min=0.05", "optim.lr_scale=linear", "data.batch=512")


@pytest.mark.parametrize(
    "override, says",
    [
        ("engine.deepspeed={x: 1}", "engine.deepspeed.x"),
        ("engine.deepspeed={zero_optimization: {stage: 2}}", "disagrees with engine.stage"),
        ("engine.deepspeed={zero_optimization: 3}", "engine.deepspeed.zero_optimization"),
        ("perf.backend=nosuch perf.compile=student", "perf.backend"),
        ("method.queue=90000000000", "method.queue"),
        ("student.hidden=1000000000000", "student.hidden"),
        ("method={name: dino, prototypes: 4000000000000}", "prototypes"),
        ("view.size=100000000", "size"),
        ("data.prefetch=100000", "data.prefetch"),
        ("data.eval_size=100000000 data.eval_resize=100000000", "data.eval_size"),
        ("student.dim=9000000000000000", "student.dim"),
    ],
)
def test_the_dry_run_refuses_what_the_run_would(folder, tmp_path, capsys, override, says):
    arguments = [override] if "{" in override else override.split()
    if "dino" in override:
        # tests/tiny.yaml gives the views a size.
        arguments = [override, "views=[{count: 2}]", "bn.sync=false", "optim.warmup_epochs=0"]
    text = dry(capsys, *tiny(folder, tmp_path, *arguments), code=2)
    assert says in text and text.count("\n") == 1, text


def test_the_run_refuses_a_size_beyond_memory_in_one_sentence(folder, tmp_path):
    (code, says), *_ = ranks(1, _fails, tiny(folder, tmp_path, "method.queue=90000000000000"))
    assert code == 2 and "method.queue: needs" in says and says.count("\n") == 1, says


@pytest.mark.parametrize(
    "key, values",
    [
        ("optim.lr", ["0"]),
        ("students", ["[{lr: 0}, {arch: resnet18}]"]),
        ("optim.milestones", ["[-5, 50]", "[0, 50]"]),
        ("run.stall_seconds", ["0.01", "1e30"]),
        ("view.blur_sigma", ["[1, 1e5]", "[1e30, 1e30]"]),
        ("view.jitter", ["[1e30, 0, 0, 0]"]),
        ("view.scale", ["[1e-30, 1e-30]"]),
        ("view.ratio", ["[1e-30, 1]", "[1, 1e30]"]),
        ("method.temp", ["1e-30", "1e30"]),
        ("eval.temp", ["1e-30", "1e30"]),
    ],
)
def test_numbers_that_train_nothing_or_never_end(tmp_path, key, values):
    for value in values:
        assert key in error(tmp_path, BASE, f"{key}={value}"), value


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("dino", "temp_mean", "1e30"),
        ("dino", "temp_mean_start", "1e-30"),
        ("swav", "epsilon", "1e-30"),
        ("swav", "iterations", "1000000"),
        ("seed", "temp_teacher", "1e30"),
    ],
)
def test_so_are_those_of_other_methods(tmp_path, name, key, value):
    more = (f"method.name={name}", "teacher.file=/t", f"method.{key}={value}")
    assert f"method.{key}" in error(tmp_path, BASE, *more)


def test_steps_of_the_learning_rate_lie_within_the_training(tmp_path):
    step = ("optim.schedule=step", "run.epochs=100")
    for more in ((), ("optim.milestones=[100]",), ("optim.milestones=[]",)):
        says = error(tmp_path, BASE, *step, *more)
        assert "optim.milestones" in says and "run.epochs" in says, says
    load(tmp_path, BASE, *step, "optim.milestones=[60, 120]")
    load(tmp_path, BASE, "optim.milestones=[]")


@pytest.mark.parametrize("kwargs", ["{drop_rate: 5}", "{bn_eps: -1}", "{global_pool: ''}"])
def test_arguments_of_timm_that_no_forward_takes(folder, tmp_path, kwargs):
    args = tiny(folder, tmp_path, f"student.kwargs={kwargs}")
    (code, says), *_ = ranks(1, _fails, args)
    assert code == 2 and says.count("\n") == 1, says
    assert "student.kwargs" in says and "test_efficientnet" in says, says


def test_a_network_that_looks_at_values_is_tried_on_the_cpu(folder, tmp_path, monkeypatch):
    path, *overrides = [str(x) for x in tiny(folder, tmp_path, "student.kwargs={drop_rate: 0.1}")][
        1:
    ]
    cfg = config.load(path, overrides)
    tried = []

    class Looks(nn.Module):
        def forward(self, views):
            tried.append(views[0].device.type)
            return views[0].sum().item()

    monkeypatch.setattr(build, "create", lambda *args: Looks())
    before = torch.get_rng_state()
    build._try_training(cfg, (32,))
    assert tried == ["meta", "cpu"] and torch.equal(torch.get_rng_state(), before)


def test_shipped_numbers_pass(tmp_path):
    for name in config.RECIPES:
        more = ("teacher.file=/t", f"method.name={name}")
        load(tmp_path, BASE, *more)
