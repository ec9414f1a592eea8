"""DINO's step, alone and with DisCo, against the paper's loop written out in float64; its
schedules; micro batches, ranks and golden losses."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as td
from conftest import ranks
from loop import DIM, HIDDEN, Run, check_golden, close, crops, drawn, halves, mine, unit
from torch import nn

from fastdisco import config, models
from fastdisco.common import dist
from fastdisco.engine import optim
from fastdisco.methods import Progress
from fastdisco.methods.dino import Dino
from fastdisco.models import heads

SIZES = (12, 12, 9, 9, 9)  # two large crops and three small ones
B, P, CLIP = 8, 12, 0.05
OPTIM = config.Optim(
    name="adamw",
    lr=0.01,
    lr_min=1e-3,
    warmup_epochs=1,
    weight_decay=0.04,
    weight_decay_end=0.4,
    decay_norm_and_bias=False,
    clip=CLIP,
    clip_each=True,
)
STEPS = 20  # 4 epochs of 5


def head(rng):
    return drawn(
        nn.Sequential(
            nn.Linear(8, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, DIM),
        ),
        rng,
    )


def dino(teacher=False, distill=1.0, told=OPTIM, **options):
    block = config.Dino(
        prototypes=P, momentum=0.9, temp_mean=0.07, temp_warmup_epochs=3, distill=distill
    )
    return Run(block, head, told, head if teacher else None, joint=True, **options)


# ---- the paper's loop


class Paper:
    def __init__(self, run):
        self.student = nn.ModuleDict(dict(backbone=run.plain[0], head=run.plain[1])).train()
        self.student.register_parameter("last", nn.Parameter(run.plain_prototypes))
        self.mean = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher, self.centre, self.done = (
            run.plain_teacher,
            torch.zeros(P, dtype=torch.float64),
            0,
        )
        self.first = {n: torch.zeros_like(p) for n, p in self.student.named_parameters()}
        self.second, self.count = copy.deepcopy(self.first), dict.fromkeys(self.first, 0)

    def forward(self, net, views):
        """Bottlenecks of length 1 and outputs of a layer whose rows have length 1; one forward of
        the backbone per resolution."""
        features = [net["backbone"](torch.cat(same)) for same in (views[:2], views[2:]) if same]
        z = unit(net["head"](torch.cat(features)))
        return z.view(len(views), B, DIM), (z @ unit(net.last).T).view(len(views), B, P)

    def step(self, views, epoch):
        z, s = self.forward(self.student, views)
        with torch.no_grad():
            _, t = self.forward(self.mean, views[:2])
        sharp = [0.04, 0.055, 0.07, 0.07][epoch]  # once an epoch, evenly up to the last of three
        loss, pairs = 0.0, 0
        for g in range(2):
            q = torch.softmax((t[g] - self.centre) / sharp, 1)
            for v in range(len(views)):
                if v != g:
                    loss, pairs = (
                        loss - (q * torch.log(torch.softmax(s[v] / 0.1, 1))).sum(1).mean(),
                        pairs + 1,
                    )
        loss = loss / pairs
        self.centre = 0.9 * self.centre + 0.1 * t.reshape(-1, P).mean(0)
        distill = torch.zeros(())
        if self.teacher:
            with torch.no_grad():
                far = unit(self.teacher(torch.cat(views[:2]))).view(2, B, DIM)
            distill = (z[:2] - far).square().sum(2).mean(1).sum()
        named = dict(self.student.named_parameters())
        grads = dict(zip(named, torch.autograd.grad(loss + distill, list(named.values()))))
        along = self.done / STEPS
        lr = (
            0.01 * self.done / 5
            if self.done < 5
            else 1e-3 + 0.5 * (0.01 - 1e-3) * (1 + math.cos(math.pi * (self.done - 5) / 15))
        )
        decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * along))
        with torch.no_grad():
            for name, p in named.items():
                g = grads[name] * min(1, CLIP / (grads[name].norm() + 1e-6))
                if name == "last" and epoch == 0:
                    continue
                self.count[name] += 1
                n = self.count[name]
                p *= 1 - lr * (decay if p.ndim > 1 else 0)
                self.first[name] = 0.9 * self.first[name] + 0.1 * g
                self.second[name] = 0.999 * self.second[name] + 0.001 * g * g
                p -= (
                    lr
                    * (self.first[name] / (1 - 0.9**n))
                    / ((self.second[name] / (1 - 0.999**n)).sqrt() + 1e-8)
                )
            m = 1 - (1 - 0.9) * 0.5 * (1 + math.cos(math.pi * along))
            for mean, p in zip(self.mean.parameters(), self.student.parameters()):
                mean.copy_(m * mean + (1 - m) * p)
        self.done += 1
        return loss.item(), distill.item(), grads


def names(state):
    return {n.replace("prototypes.weight", "last"): x for n, x in state}


@pytest.mark.parametrize("teacher", [False, True], ids=["dino", "disco"])
def test_steps_are_those_of_the_paper(teacher):
    """Through the warm-up and the frozen epoch into the third."""
    run = dino(teacher)
    paper = Paper(run)
    for step in range(11):
        views = crops(step, B, SIZES)
        loss, grads, terms = run.step(step, views)
        want = paper.step(views, step // 5)
        assert loss == pytest.approx(want[0] + want[1], rel=1e-9) and terms[
            "dino"
        ].item() == pytest.approx(want[0], rel=1e-9)
        if teacher:
            assert terms["distill"].item() == pytest.approx(want[1], rel=1e-9)
        close(names(run.all_grads.items()), want[2])
        assert (grads["prototypes.weight"] is None) == (step < 5)
        close(names(run.net.named_parameters()), dict(paper.student.named_parameters()))
        close(names(run.ema.named_parameters()), dict(paper.mean.named_parameters()))
        close(run.method.centre, paper.centre)


def test_every_trainable_weight_gets_a_gradient_and_nothing_else():
    run = dino(teacher=True)
    before = copy.deepcopy(run.teacher.net.state_dict())
    for step in range(2):
        run.step(step, crops(step, B, SIZES))
    # That one stands before a batch norm.
    assert all(g.abs().max() > 1e-12 or n == "backbone.3.bias" for n, g in run.all_grads.items())
    assert not any(p.requires_grad for net in (run.ema, run.teacher.net) for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in run.teacher.net.state_dict().items())
    assert list(run.method.state_dict()) == ["centre"]


def test_schedules_are_the_published_ones():
    method = Dino(config.Dino(prototypes=P), DIM, 0, False)
    at = lambda share: method.momentum(Progress(0, share))
    assert [at(s) for s in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1.0])
    assert [method.temp(e) for e in (0, 0.9, 50)] == [0.04] * 3  # no warm-up by default
    warm = Dino(config.Dino(prototypes=P, temp_mean=0.07, temp_warmup_epochs=30), DIM, 0, False)
    assert [warm.temp(e) for e in (0, 1.5, 29, 30, 99)] == pytest.approx(
        [0.04, 0.04 + 0.03 / 29, 0.07, 0.07, 0.07]
    )
    assert [method.frozen(Progress(0, 0, e)) for e in (0.0, 0.99, 1.0)] == [
        ("prototypes.",),
        ("prototypes.",),
        (),
    ]
    told = config.validate(
        {"run": {"name": "x"}, "data": {"train": "t"}, "method": {"name": "dino"}}, "test"
    )
    assert optim.base_lr(told.optim, told.data.batch) == 0.001
    assert [optim.rate(told.optim, 0.001, e, 100) for e in (0, 5, 10, 55, 100)] == pytest.approx(
        [0, 5e-4, 1e-3, 1e-6 + (1e-3 - 1e-6) / 2, 1e-6]
    )
    assert [optim.decay(told.optim, e, 100) for e in (0, 50, 100)] == pytest.approx(
        [0.04, 0.22, 0.4]
    )


@pytest.mark.parametrize(
    "arch, kwargs",
    [
        ("test_vit", {"drop_path_rate": 0.5}),
        ("test_vit", {"drop_rate": 0.5}),
        ("test_vit", {"patch_drop_rate": 0.5}),
        ("test_vit", {"attn_drop_rate": 0.5, "proj_drop_rate": 0.5, "pos_drop_rate": 0.5}),
        ("xcit_nano_12_p16_224", {"drop_path_rate": 0.5}),
        ("test_efficientnet", {"drop_rate": 0.5}),
        ("test_resnet", {"drop_rate": 0.5}),
        ("mobilenetv3_small_050", {"drop_rate": 0.5}),
        ("convnext_atto", {"drop_rate": 0.5}),
    ],
    ids=str,
)
def test_only_the_student_drops_something(arch, kwargs):
    torch.manual_seed(0)
    net = models.create(arch, lambda dim: heads.dino_mlp(dim, 8, 4), kwargs, sizes=(32,))
    ema, x = models.ema_copy(net), [torch.randn(4, 3, 32, 32)]
    assert net.training and ema.training
    assert not torch.equal(net(x).z, net(x).z) and torch.equal(ema(x).z, ema(x).z)
    if arch == "test_vit":  # no batch norm
        torch.testing.assert_close(ema(x).z, net.eval()(x).z)


# ---- micro batches, ranks


def test_the_centre_is_of_all_micro_batches():
    told = OPTIM.model_copy(update={"clip_each": False})
    one, two = dino(True, told=told, bn=False), dino(True, told=told, bn=False)
    for step in range(3):
        views = crops(step, B, SIZES)
        want, got = one.step(step, views), two.step(step, *halves(views))
        assert got[0] == pytest.approx(want[0], rel=1e-10)
        close(two.all_grads, one.all_grads)
        close(two.method.centre, one.method.centre)


def _steps(teacher, **options):
    run, out = dino(teacher, **options), []
    for step in range(4):
        loss, *_ = run.step(step, crops(step, B, SIZES, mine(B)))
        out.append(
            (
                dist.all_mean(torch.tensor(loss, dtype=torch.float64)).item(),
                [g.numpy() for g in run.all_grads.values()],
                run.method.centre.numpy().copy(),
            )
        )
    return out


def _two_ranks():
    td.init_process_group("gloo")
    out = {
        (bn, teacher): _steps(teacher, bn=bn, told=UNCLIPPED)
        for bn in (False, True)
        for teacher in (False, True)
    }
    td.destroy_process_group()
    return out


UNCLIPPED = OPTIM.model_copy(update={"clip": 0.0})


@pytest.fixture(scope="module")
def pair():
    return ranks(2, _two_ranks)


@pytest.mark.parametrize("teacher", [False, True], ids=["dino", "disco"])
@pytest.mark.parametrize("bn", [False, True])
def test_two_ranks_are_one_rank_with_the_whole_batch(pair, bn, teacher):
    # With batch norm, two groups that the ranks hold.
    one = _steps(teacher, bn=bn, told=UNCLIPPED, groups=2 if bn else 1)
    for want, a, b in zip(one, pair[0][bn, teacher], pair[1][bn, teacher]):
        assert a[0] == b[0] == pytest.approx(want[0], rel=1e-9)
        for g, x, y in zip(want[1] + [want[2]], a[1] + [a[2]], b[1] + [b[2]]):
            assert np.array_equal(x, y) and np.abs(x - g).max() <= 1e-9 * max(1, np.abs(g).max())


# ---- golden losses


@pytest.mark.parametrize("teacher", [False, True], ids=["dino", "dino_disco"])
def test_golden_losses(teacher):
    run = dino(teacher, groups=2)
    check_golden(
        "dino_disco" if teacher else "dino",
        [run.step(step, crops(step, B, SIZES))[0] for step in range(20)],
    )
