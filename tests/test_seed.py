"""SEED's step, with and without MoCo's contrast, and RKD beside MoCo, against the papers' loops
written out in float64."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as td
import torch.nn.functional as F
from conftest import ranks
from loop import (
    DIM,
    HIDDEN,
    Run,
    check_golden,
    close,
    crops,
    drawn,
    generator,
    halves,
    mine,
    uniform,
    unit,
)
from torch import nn

from fastdisco import config, kernels
from fastdisco.common import dist

pytestmark = pytest.mark.usefixtures("unwritten")

B = 8
OPTIM = config.Optim(lr=0.1, weight_decay=1e-2, warmup_epochs=1)
METHODS = {
    "seed": config.Seed(queue=20, temp_teacher=0.05),
    "seed_contrast": config.Seed(queue=20, temp_teacher=0.05, contrast=0.5, momentum=0.9),
    "rkd": config.Moco(
        queue=20, momentum=0.9, distill=0.0, rkd=config.Rkd(distance=1.0, angle=2.0)
    ),
    "rkd_disco": config.Moco(queue=20, momentum=0.9, rkd=config.Rkd(distance=1.0, angle=2.0)),
}


def head(rng):
    return drawn(nn.Sequential(nn.Linear(8, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM)), rng)


def run_of(name, **options):
    run, rng = Run(METHODS[name], head, OPTIM, head, **options), generator(5)
    for queue in (getattr(run.method, n, None) for n in ("queue", "negatives")):
        if queue is not None:
            queue.rows.copy_(unit(uniform(rng, 20, DIM)))
    return run


def views_of(name, step, share=slice(None)):
    return crops(step, B, (12,) if name == "seed" else (12, 12), share)


# ---- the papers' loops


def relations(z):
    """Distances in units of their mean, and cosines at every triple, one by one."""
    n = len(z)
    far = torch.stack(
        [
            (z[i] - z[j]).square().sum().sqrt() if i != j else torch.zeros(()).double()
            for i in range(n)
            for j in range(n)
        ]
    )
    far = far / far[far > 0].mean()
    to = lambda i, j: (
        (z[j] - z[i]) / (z[j] - z[i]).square().sum().sqrt()
        if i != j
        else torch.zeros(z.shape[1]).double()
    )
    angle = torch.stack([to(i, j) @ to(i, k) for i in range(n) for j in range(n) for k in range(n)])
    return far, angle


def smooth_l1(x, y):
    d = (x - y).abs()
    return torch.where(d < 1, d * d / 2, d - 0.5).mean()


class Paper:
    def __init__(self, run, name):
        self.name, self.student, self.teacher = name, run.plain.train(), run.plain_teacher
        self.mean = copy.deepcopy(self.student)
        self.weights = list(self.student.parameters())
        self.velocity = [torch.zeros_like(p) for p in self.weights]
        # Of the teacher for SEED, of the mean student for MoCo.
        self.targets = list(run.method.queue.rows.clone())
        self.keys = (
            list(run.method.negatives.rows.clone()) if name == "seed_contrast" else self.targets
        )

    def contrast(self, q, k):
        return -torch.stack(
            [
                torch.log_softmax(torch.cat([(a @ b)[None], torch.stack(self.keys) @ a]) / 0.2, 0)[
                    0
                ]
                for a, b in zip(q, k)
            ]
        ).mean()

    def step(self, views, done):
        q = unit(self.student(views[0]))
        terms = {}
        with torch.no_grad():
            t = unit(self.teacher(views[0]))
            if self.name != "seed":
                for mean, weight in zip(self.mean.parameters(), self.weights):
                    mean.copy_(0.9 * mean + 0.1 * weight)
                k = unit(self.mean(views[1]))
        if self.name.startswith("seed"):
            scores = [
                torch.cat([(x * t).sum(1, keepdim=True), x @ torch.stack(self.targets).T], 1)
                for x in (q, t)
            ]
            terms["seed"] = (
                -(torch.softmax(scores[1] / 0.05, 1) * torch.log_softmax(scores[0] / 0.2, 1))
                .sum(1)
                .mean()
            )
        if self.name != "seed":
            terms["contrast"] = self.contrast(q, k)
        if self.name.startswith("rkd"):
            (far, angle), (far_t, angle_t) = relations(q), relations(t)
            terms["rkd_distance"], terms["rkd_angle"] = (
                smooth_l1(far, far_t),
                smooth_l1(angle, angle_t),
            )
        if self.name == "rkd_disco":
            with torch.no_grad():
                t2 = unit(self.teacher(views[1]))
            terms["distill"] = (
                (q - t).square().sum() + (unit(self.student(views[1])) - t2).square().sum()
            ) / B
        weigh = {
            "seed": 1.0,
            "contrast": 0.5 if self.name == "seed_contrast" else 1.0,
            "rkd_distance": 1.0,
            "rkd_angle": 2.0,
            "distill": 32.0,
        }
        loss = sum(weigh[n] * x for n, x in terms.items())
        grads = torch.autograd.grad(loss, self.weights)
        lr = 0.1 * done / 5 if done < 5 else 0.1 * 0.5 * (1 + math.cos(math.pi * (done - 5) / 15))
        with torch.no_grad():
            for p, v, g in zip(self.weights, self.velocity, grads):
                v.copy_(0.9 * v + g + 1e-2 * p)
                p -= lr * v
        if self.name.startswith("seed"):
            self.targets = (self.targets + list(t))[-20:]
        if self.name != "seed":
            self.keys = (self.keys + list(k))[-20:]
        if self.name.startswith("rkd"):
            self.targets = self.keys
        return loss.item(), terms, grads


def rows(found):
    return sorted(found.tolist())


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_the_papers(name):
    run = run_of(name)
    paper = Paper(run, name)
    for step in range(4):  # the queue wraps in the third
        views = views_of(name, step)
        loss, grads, terms = run.step(step, views)
        want, parts, want_grads = paper.step(views, step)
        assert loss == pytest.approx(want, rel=1e-10)
        assert {n: terms[n].item() for n in parts} == pytest.approx(
            {n: x.item() for n, x in parts.items()}, rel=1e-10
        )
        assert set(terms) - set(parts) == {"feat/std"} | (
            {"distill/cosine"} if name in ("seed", "seed_contrast", "rkd_disco") else set()
        )
        close(list(grads.values()), list(want_grads))
        close(list(run.net.parameters()), paper.weights)
        close(rows(run.method.queue.rows), rows(torch.stack(paper.targets)))
        if name == "seed_contrast":
            close(rows(run.method.negatives.rows), rows(torch.stack(paper.keys)))
    assert (run.ema is None) == (name == "seed")


@pytest.mark.parametrize("name", METHODS)
def test_every_trainable_weight_gets_a_gradient_and_nothing_else(name):
    run = run_of(name)
    before = copy.deepcopy(run.teacher.net.state_dict())
    for step in range(2):
        run.step(step, views_of(name, step))
    # That one stands before a batch norm.
    assert all(g.abs().max() > 1e-12 or n == "backbone.3.bias" for n, g in run.all_grads.items())
    assert all(torch.equal(before[k], v) for k, v in run.teacher.net.state_dict().items())
    want = (
        ["negatives.ptr", "negatives.rows", "queue.ptr", "queue.rows"]
        if name == "seed_contrast"
        else ["queue.ptr", "queue.rows"]
    )
    assert sorted(run.method.state_dict()) == want


def test_the_teachers_logged_cosine_is_the_mean_one():
    run = run_of("seed")
    with torch.no_grad():
        want = (
            (
                unit(run.plain(views_of("seed", 0)[0]))
                * unit(run.plain_teacher(views_of("seed", 0)[0]))
            )
            .sum(1)
            .mean()
            .item()
        )
    assert run.step(0, views_of("seed", 0))[2]["distill/cosine"].item() == pytest.approx(
        want, abs=1e-6
    )


# ---- RKD


def test_rkd_is_float32_under_autocast_and_refuses():
    z, t = uniform(generator(1), 6, DIM), uniform(generator(2), 6, 9)  # widths may differ
    want = kernels.rkd(z, t)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernels.rkd(z.float(), t.float())
    assert {x.dtype for x in got} == {torch.float32}
    torch.testing.assert_close([x.double() for x in got], list(want), rtol=1e-5, atol=1e-7)
    for zs, zt, says in (
        (z[:1], t[:1], "2 images"),
        (z, t[:5], "2 images"),
        (z, t.clone().requires_grad_(), "detach"),
    ):
        with pytest.raises(ValueError, match=says):
            kernels.rkd(zs, zt)


def test_rkd_stands_equal_and_turned_rows_and_has_a_gradient_there():
    z = uniform(generator(1), 6, DIM)
    turn = torch.linalg.qr(uniform(generator(3), DIM, DIM))[0]
    distance, angle = kernels.rkd(z, z @ turn)
    assert max(distance.item(), angle.item()) < 1e-14  # relations alone count
    same = z[:1].repeat(6, 1).requires_grad_()
    sum(kernels.rkd(torch.cat([same[:2], z[2:]]), z)).backward()
    assert same.grad.isfinite().all() and F.normalize(z).isfinite().all()


# ---- micro batches, ranks


@pytest.mark.parametrize("name", ["seed", "seed_contrast"])
def test_two_micro_batches_are_one_batch(name):
    one, two = run_of(name, bn=False), run_of(name, bn=False)
    for step in range(3):
        views = views_of(name, step)
        want, got = one.step(step, views), two.step(step, *halves(views))
        assert got[0] == pytest.approx(want[0], rel=1e-10)
        close(got[1], want[1])
        close(two.method.queue.rows, one.method.queue.rows)


def _steps(name, **options):
    run, out = run_of(name, **options), []
    for step in range(3):
        loss, grads, _ = run.step(step, views_of(name, step, mine(B)))
        out.append(
            (
                dist.all_mean(torch.tensor(loss, dtype=torch.float64)).item(),
                [g.numpy() for g in grads.values()],
                [x.numpy().copy() for n, x in sorted(run.method.state_dict().items())],
            )
        )
    return out


def _two_ranks():
    td.init_process_group("gloo")
    out = {name: _steps(name) for name in ("seed", "seed_contrast")}
    td.destroy_process_group()
    return out


def test_two_ranks_are_one_rank_with_the_whole_batch():
    first, second = ranks(2, _two_ranks)
    for name in ("seed", "seed_contrast"):
        for want, a, b in zip(_steps(name, groups=2), first[name], second[name]):
            assert a[0] == b[0] == pytest.approx(want[0], rel=1e-10)
            for g, x, y in zip(want[1] + want[2], a[1] + a[2], b[1] + b[2]):
                assert np.array_equal(x, y) and np.abs(x - g).max() <= 1e-10 * max(
                    1, np.abs(g).max()
                )


# ---- golden losses


@pytest.mark.parametrize("name", METHODS)
def test_golden_losses(name):
    run = run_of(name, groups=2)
    check_golden(name, [run.step(step, views_of(name, step))[0] for step in range(20)])
