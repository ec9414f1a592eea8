"""Schedules against their formulas, the scaling rule, the parameter groups, and what DeepSpeed is
told."""

import math

import pytest
import torch
from pydantic import ValidationError

from fastdisco import engine
from fastdisco.config import Engine, Optim, UserError, validate
from fastdisco.engine import optim


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))


def test_cosine_moves_every_step_or_every_epoch():
    for epoch in (0.0, 0.5, 1.0, 73.25, 199.99):
        assert optim.lr_factor(Optim(), epoch, 200) == pytest.approx(
            0.5 * (1 + math.cos(math.pi * epoch / 200))
        )
        assert optim.lr_factor(Optim(per="epoch"), epoch, 200) == pytest.approx(
            0.5 * (1 + math.cos(math.pi * int(epoch) / 200))
        )


def test_steps_and_constant():
    cfg = Optim(schedule="step", milestones=(120, 160))
    assert [
        optim.lr_factor(cfg, e, 200) for e in (0, 119.9, 120, 159.9, 160, 199)
    ] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert optim.lr_factor(Optim(schedule="constant"), 150, 200) == 1


def test_warm_up_is_linear_and_the_cosine_takes_the_rest():
    cfg = Optim(warmup_epochs=10)
    assert [optim.lr_factor(cfg, e, 110) for e in (0, 2.5, 5, 10, 60, 110)] == pytest.approx(
        [0, 0.25, 0.5, 1, 0.5, 0]
    )
    whole = [optim.lr_factor(Optim(warmup_epochs=3, per="epoch"), e, 103) for e in range(4)]
    assert whole == pytest.approx([0.25, 0.5, 0.75, 1])  # never an epoch at 0


def test_the_cosine_can_end_above_0_and_the_warm_up_does_not_begin_there():
    cfg = Optim(warmup_epochs=10, lr_min=0.02)
    assert [optim.rate(cfg, 0.1, e, 110) for e in (0, 5, 10, 60, 110)] == pytest.approx(
        [0, 0.05, 0.1, 0.06, 0.02]
    )
    assert [
        optim.rate(Optim(lr_min=0.02, per="epoch"), 0.1, e, 2) for e in (0, 0.9, 1.5)
    ] == pytest.approx([0.1, 0.1, 0.06])


@pytest.mark.parametrize("batch", [256, 1024, 64])
def test_seeds_learning_rate_is_that_of_its_code(batch):
    """Once an epoch: from lr to lr x batch / 256 in 5, then a cosine that counts from epoch 0."""
    cfg = validate(
        {
            "run": {"name": "x"},
            "data": {"train": "t", "batch": batch},
            "teacher": {"file": "t"},
            "method": {"name": "seed"},
        },
        "test",
    )
    top, epochs = 0.03 * batch / 256, cfg.run.epochs
    assert epochs == 200
    want = [0.03 + (top - 0.03) / 5 * e for e in range(5)]
    want += [top * 0.5 * (1 + math.cos(math.pi * e / 200)) for e in range(5, 200)]
    lr = optim.base_lr(cfg.optim, batch)
    for within in (0.0, 0.5, 0.99):
        assert [optim.rate(cfg.optim, lr, e + within, epochs) for e in range(200)] == pytest.approx(
            want
        )


def test_a_warm_up_may_begin_at_lr_and_the_cosine_at_the_start_in_any_step():
    cfg = Optim(lr=0.1, warmup_epochs=10, warmup_from="lr", cosine_from="start", lr_min=0.02)
    assert [optim.rate(cfg, 0.5, e, 100) for e in (0, 2.5, 5, 50, 100)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.26, 0.02]
    )
    # A fraction of an epoch of warm-up lasts as long as the epoch, in both of its parts.
    cfg = Optim(warmup_epochs=1.5, per="epoch", lr_min=0.02)
    assert optim.rate(cfg, 0.5, 1.9, 100) == pytest.approx(0.5 * 2 / 2.5)


def test_the_decay_follows_its_own_cosine_and_spares_what_has_none():
    cfg = Optim(name="adamw", weight_decay=0.04, weight_decay_end=0.4, decay_norm_and_bias=False)
    assert [optim.decay(cfg, e, 100) for e in (0, 25, 50, 100)] == pytest.approx(
        [0.04, 0.4 - 0.18 * (1 + math.cos(math.pi / 4)), 0.22, 0.4]
    )
    assert optim.decay(Optim(), 50, 100) == 1e-4
    made = optim.create(net(), cfg, 0.1)
    for lr, decay in ((0.3, 0.1), (0.2, 0.4)):
        optim.move(made, lr, decay)
        assert sorted((g["weight_decay"], g["lr"]) for g in made.param_groups) == [
            (0.0, lr),
            (decay, lr),
        ]


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_frozen_weights_keep_still_and_have_neither_decay_nor_momentum(name):
    frozen, free = (
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)) for _ in range(2)
    )
    free.load_state_dict(frozen.state_dict())
    made = [optim.create(n, Optim(name=name, weight_decay=0.1), 0.1) for n in (frozen, free)]
    x = torch.randn(5, 3)
    for n, opt in zip((frozen, free), made):
        n(x).square().sum().backward()
        optim.freeze(n, ("1.",) if n is frozen else ())
        opt.step()
    assert torch.equal(frozen[0].weight, free[0].weight) and not torch.equal(
        frozen[1].weight, free[1].weight
    )
    assert [n for n, p in frozen.named_parameters() if p in made[0].state] == ["0.weight", "0.bias"]


def test_each_gradient_is_cut_by_itself():
    n = net()
    made = optim.create(n, Optim(weight_decay=0, momentum=0, clip=0.5, clip_each=True), 1.0)
    before, grads = [p.detach().clone() for p in n.parameters()], []
    for i, p in enumerate(n.parameters()):
        p.grad = torch.randn_like(p) * 10.0 ** (i - 2)
        grads.append(p.grad.clone())
    made.step()
    for b, g, p in zip(before, grads, n.parameters()):
        torch.testing.assert_close(b - p.detach(), g * min(1.0, 0.5 / (g.norm().item() + 1e-6)))
    assert {g.norm().item() > 0.5 for g in grads} == {True, False}


@pytest.mark.parametrize("rule, lr", [("none", 0.03), ("linear", 0.12), ("sqrt", 0.06)])
def test_the_scaling_rule(rule, lr):
    assert optim.base_lr(Optim(lr_scale=rule), 1024) == pytest.approx(lr)


def test_sgd_is_plain_and_decays_everything_as_published():
    n = net()
    sgd = optim.create(n, Optim(), 0.03)
    x = torch.randn(2, 3, 5, 5)
    weights, bufs = (
        [p.detach().clone() for p in n.parameters()],
        [torch.zeros_like(p) for p in n.parameters()],
    )
    for _ in range(3):
        sgd.zero_grad()
        n(x).square().sum().backward()
        for w, b, p in zip(weights, bufs, n.parameters()):
            b.mul_(0.9).add_(p.grad + 1e-4 * w)
            w.sub_(0.03 * b)
        sgd.step()
        for w, p in zip(weights, n.parameters()):
            torch.testing.assert_close(p.detach(), w)


def test_norms_and_biases_can_be_spared_from_decay():
    decays = {
        g["weight_decay"]: sum(p.numel() for p in g["params"])
        for g in optim.create(net(), Optim(decay_norm_and_bias=False), 0.1).param_groups
    }
    assert decays == {0.0: 4 + 4 + 4, 1e-4: 3 * 4 * 9}


def test_on_a_gpu_torchs_optimizers_are_fused():
    for name, fused in dict(
        momentum=True,
        sgd=True,
        adam=True,
        AdamW=True,
        adagrad=True,
        lars=False,
        lamb=False,
        lion=False,
        lookahead_sgd=False,
    ).items():
        assert optim._fused(name, torch.device("cuda")) == ({"fused": True} if fused else {}), name
        assert optim._fused(name, torch.device("cpu")) == {}


def test_deepspeed_is_told_to_clip_at_what_we_say():
    told = engine.deepspeed_config(Engine(precision="bf16"), 32, 2, 0.0, 10)
    assert (
        told["gradient_clipping"] == 0.0
        and told["train_micro_batch_size_per_gpu"] == 32
        and told["gradient_accumulation_steps"] == 2
    )
    assert (
        told["torch_autocast"]
        == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        and not {"bf16", "fp16"} & told.keys()
    )
    assert not told["timers"]["throughput"]["enabled"]
    raw = engine.deepspeed_config(
        Engine(deepspeed={"zero_optimization": {"reduce_bucket_size": 7}}), 1, 1, 0.0, 10
    )
    assert raw["zero_optimization"] == {"stage": 0, "reduce_bucket_size": 7}
    with pytest.raises(UserError, match="engine.stage"):
        engine.deepspeed_config(
            Engine(deepspeed={"zero_optimization": {"stage": 2}}), 1, 1, 0.0, 10
        )


def test_zero_gets_one_bucket_and_a_norm_only_to_clip_by():
    zero = lambda stage, clip, **raw: engine.deepspeed_config(
        Engine(stage=stage, deepspeed=raw), 1, 1, clip, 10
    )["zero_optimization"]
    assert (
        zero(1, 0.0)["reduce_bucket_size"]
        == zero(2, 0.0)["reduce_bucket_size"]
        == zero(3, 0.0)["reduce_bucket_size"]
        == 10
    )
    assert (
        not zero(1, 0.0)["compute_grad_norm"]
        and zero(1, 0.5)["compute_grad_norm"]
        and zero(2, 0.5)["compute_grad_norm"]
    )
    assert "compute_grad_norm" not in zero(3, 0.5)  # always there, and DeepSpeed refuses the key
    assert zero(2, 0.0, zero_optimization={"reduce_bucket_size": 5})["reduce_bucket_size"] == 5
    with pytest.raises(UserError, match="offload_optimizer.*checkpoint"):
        zero(2, 0.0, zero_optimization={"offload_optimizer": {"device": "cpu"}})


@pytest.mark.parametrize(
    "name", ["sgd", "nesterov", "adam", "adamw", "lion", "rmsprop", "nadam", "adan"]
)
def test_optimizers_that_move_each_element_by_its_own_gradient_may_be_cut(name):
    assert optim.create(net(), Optim(name=name), 0.1, stage=1).param_groups


@pytest.mark.parametrize(
    "name",
    [
        "lars",
        "larc",
        "nlars",
        "nlarc",
        "lamb",
        "lambc",
        "lambw",
        "adafactor",
        "adamp",
        "sgdp",
        "novograd",
        "muon",
        "cadamw",
    ],
)
def test_optimizers_that_need_whole_tensors_are_refused_from_stage_1(name):
    assert optim.create(net(), Optim(name=name), 0.1, stage=0).param_groups
    for stage in (1, 2, 3):
        with pytest.raises(UserError, match=f"optim.name: {name} .*engine.stage=0"):
            optim.create(net(), Optim(name=name, weight_decay=0), 0.1, stage)


def test_fp16_is_refused_from_stage_1():
    with pytest.raises(ValidationError, match="loss scale"):
        Engine(precision="fp16", stage=1)
    assert Engine(precision="fp16").stage == 0


def two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def test_fused_sgd_takes_a_weight_that_thaws_and_starts_from_no_momentum(monkeypatch):
    """As on a GPU: torch's fused SGD alone would be given no buffer for the weight that was frozen,
    and leave another's as the memory had it."""
    ends = []
    for fused in (False, True):
        monkeypatch.setattr(optim, "_fused", lambda *_, on=fused: {"fused": True} if on else {})
        net = two_layers()
        sgd = optim.create(net, Optim(weight_decay=0.1), 0.1)
        assert bool(sgd.defaults.get("fused")) == fused
        for step in range(3):
            sgd.zero_grad()
            net(torch.ones(2, 3)).square().sum().backward()
            optim.freeze(net, ("1.",) if step == 0 else ())
            sgd.step()
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*ends))


def test_each_weight_is_clipped_at_the_norm_of_its_unscaled_gradient(monkeypatch):
    """A loss scaler leaves the gradients scaled for a fused optimizer, which is given the scale."""
    monkeypatch.setattr(optim, "_fused", lambda *_: {"fused": True})
    ends = []
    for scale in (None, torch.tensor(1024.0)):
        net = two_layers()
        sgd = optim.create(
            net, Optim(clip=0.5, clip_each=True, momentum=0.0, weight_decay=0.0), 1.0
        )
        net(torch.ones(2, 3)).square().sum().mul(1.0 if scale is None else scale).backward()
        if scale is not None:
            sgd.grad_scale, sgd.found_inf = scale, torch.tensor(0.0)
        before = [p.detach().clone() for p in net.parameters()]
        sgd.step()
        ends.append([b - p.detach() for b, p in zip(before, net.parameters())])
    assert (
        all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*ends))
        and 0.49 < max(x.norm() for x in ends[0]) <= 0.5 + 1e-5
    )
