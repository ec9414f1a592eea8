"""SwAV's step, alone and with DisCo, against the paper's loop written out in float64; its codes;
micro batches, ranks and golden losses."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as td
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
from fastdisco.methods.swav import sinkhorn

SIZES = (12, 12, 9, 9, 9)  # two coded crops and three small ones
B, P = 8, 7
DISTILL = 1 / (2 * len(SIZES) * DIM)
OPTIM = config.Optim(name="lars", lr=0.6, lr_min=0.06, weight_decay=1e-2)


def head(rng):
    return drawn(
        nn.Sequential(
            nn.Linear(8, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM)
        ),
        rng,
    )


def head_without_bn(rng):
    return drawn(nn.Sequential(nn.Linear(8, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM)), rng)


def swav(
    teacher=False,
    bn=True,
    queue=16,
    freeze=2,
    queue_epoch=0,
    distill=DISTILL,
    target="normalised",
    **options,
):
    block = config.Swav(
        prototypes=P,
        queue=queue,
        queue_epoch=queue_epoch,
        freeze_steps=freeze,
        distill=distill,
        target=target,
    )
    return Run(
        block,
        head if bn else head_without_bn,
        OPTIM,
        head if teacher else None,
        bn=bn,
        joint=True,
        **options,
    )


# ---- the paper's loop


class Paper:
    """As the paper and its published code have it: crops of one size through the backbone at once,
    all through the head, codes from matrices.

    published: DisCo's teacher is not normalised, as in its own code."""

    def __init__(self, run, queue, published=False):
        self.published = published
        self.net, self.teacher, self.prototypes = (
            run.plain.train(),
            run.plain_teacher,
            run.plain_prototypes.requires_grad_(),
        )
        self.queue, self.length = [[], []], queue
        self.names = [f"backbone.{n}" for n, _ in self.net[0].named_parameters()] + [
            f"head.{n}" for n, _ in self.net[1].named_parameters()
        ]
        self.weights = dict(zip(self.names, self.net.parameters())) | {
            "prototypes.weight": self.prototypes
        }
        self.velocity = {}

    def embed(self, net, views):
        features = torch.cat([net[0](torch.cat(views[:2])), net[0](torch.cat(views[2:]))])
        return net[1](features).view(len(views), B, DIM)

    def codes(self, scores):
        q = torch.exp(scores / 0.05).T  # [P,n]
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True) * P
            q /= q.sum(0, keepdim=True) * q.shape[1]
        return (q * q.shape[1]).T

    def step(self, views, lr, frozen, queued=True):
        # In place before the forward, as the published code has it.
        with torch.no_grad():
            self.prototypes.copy_(unit(self.prototypes))
        c = self.prototypes
        z = unit(self.embed(self.net, views))
        scores = z @ c.T
        swav = 0.0
        for g in range(2):
            with torch.no_grad():
                all_scores = scores[g]
                if len(self.queue[g]) == self.length > 0:
                    all_scores = torch.cat([torch.stack(self.queue[g]) @ c.T, all_scores])
                q = self.codes(all_scores)[-B:]
            others = [v for v in range(len(views)) if v != g]
            swav = swav + sum(
                -(q * torch.log(torch.softmax(scores[v] / 0.1, 1))).sum(1).mean() for v in others
            ) / len(others)
        mse = torch.zeros(())
        if self.teacher:
            with torch.no_grad():
                t = self.embed(self.teacher, views)
                t = t if self.published else unit(t)
            mse = (z - t).square().mean()
        loss = (swav + mse) / 2
        grads = dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values()))))
        with torch.no_grad():
            for name, p in self.weights.items():
                if frozen and name == "prototypes.weight":
                    continue
                g = grads[name]
                trust = 0.001 * p.norm() / (g.norm() + 1e-2 * p.norm() + 1e-8)
                first = name not in self.velocity
                step = trust * (g + 1e-2 * p)
                self.velocity[name] = step.clone() if first else 0.9 * self.velocity[name] + step
                p -= lr * self.velocity[name]
            moved = unit(self.prototypes)
        for g in range(2 if queued and self.length else 0):
            self.queue[g] = (self.queue[g] + list(z[g].detach()))[-self.length :]
        # What the next forward will see; a frozen row stays to the last bit.
        seen = self.weights | {"prototypes.weight": self.prototypes if frozen else moved}
        return loss.item(), swav.item() / 2, mse.item(), grads, seen


@pytest.mark.parametrize(
    "teacher, target",
    [(False, "normalised"), (True, "normalised"), (True, "published")],
    ids=["swav", "disco", "disco published"],
)
@pytest.mark.parametrize("queue", [0, 16])
def test_steps_are_those_of_the_paper(teacher, target, queue):
    # Two steps fill the queue, the third uses it.
    run = swav(teacher, queue=queue, target=target)
    paper = Paper(run, queue, target == "published")
    for step in range(6):  # in the last three the prototypes have momentum
        views = crops(step, B, SIZES)
        loss, grads, terms = run.step(step, views)
        lr = 0.06 + (0.6 - 0.06) * 0.5 * (1 + np.cos(np.pi * step / 20))
        want = paper.step(views, lr, frozen=step < 2)
        assert loss == pytest.approx(want[0], rel=1e-10) and terms["swav"].item() == pytest.approx(
            want[1], rel=1e-10
        )
        if teacher:
            assert terms["distill"].item() == pytest.approx(want[2] * len(SIZES) * DIM, rel=1e-10)
        close(run.all_grads, want[3])
        assert (grads["prototypes.weight"] is None) == (step < 2)
        close({n: p.detach() for n, p in run.net.named_parameters()}, want[4])
        assert run.method.filled == min(queue, B * (step + 1))
    if queue:
        close(
            sorted(run.method.queues[1].rows.tolist()), sorted(torch.stack(paper.queue[1]).tolist())
        )


def test_the_published_target_pulls_by_its_length():
    z = uniform(generator(1), 3, 4, DIM).requires_grad_()
    t = 5 * uniform(generator(2), 3, 4, DIM)
    pull = lambda raw: torch.autograd.grad(kernels.distill(z, t, raw_targets=raw), z)[0]
    close(pull(True), pull(False) * t.norm(dim=-1, keepdim=True))
    terms = swav(teacher=True, target="published").step(0, crops(0, B, SIZES))[2]
    one = swav(teacher=True).step(0, crops(0, B, SIZES))[2]
    assert terms["distill/cosine"].item() == pytest.approx(one["distill/cosine"].item(), abs=1e-6)


def test_the_queue_changes_the_codes_and_begins_at_its_epoch():
    early, late = swav(queue_epoch=0), swav(queue_epoch=1)  # of 5 steps
    losses = [
        (
            early.step(s, crops(s, B, SIZES))[0],
            late.step(s, crops(s, B, SIZES))[0],
            late.method.filled,
        )
        for s in range(8)
    ]
    assert [a == b for a, b, _ in losses[:3]] == [True, True, False]
    assert [filled for *_, filled in losses] == [0, 0, 0, 0, 0, 8, 16, 16]


def test_every_trainable_weight_gets_a_gradient_and_the_teacher_none():
    run = swav(teacher=True)
    before = copy.deepcopy(run.teacher.net.state_dict())
    for step in range(3):
        run.step(step, crops(step, B, SIZES))
    assert all(torch.equal(before[k], v) for k, v in run.teacher.net.state_dict().items())
    dead = {"head.0.bias", "backbone.3.bias"}  # before a batch norm
    assert all((g.abs().max() > 1e-12) or n in dead for n, g in run.all_grads.items())
    assert run.ema is None and run.method.momentum(None) is None


def test_frozen_prototypes_stay_and_then_move():
    run = swav(freeze=2)
    before = run.net.prototypes.weight.detach().clone()
    moved = []
    for step in range(3):
        run.step(step, crops(step, B, SIZES))
        moved.append(not torch.equal(before, run.net.prototypes.weight))
    assert moved == [False, False, True]


# ---- codes


def plain_codes(scores, epsilon, iterations):
    """Sinkhorn and Knopp by hand, one entry at a time."""
    n, p = scores.shape
    q = np.exp(scores.numpy() / epsilon)
    for _ in range(iterations):
        q = q / q.sum(0, keepdims=True) / p
        q = q / q.sum(1, keepdims=True) / n
    return torch.from_numpy(q * n)


@pytest.mark.parametrize("epsilon, iterations", [(0.05, 3), (0.05, 1), (0.5, 10)])
def test_codes(epsilon, iterations):
    scores = uniform(generator(1), 2, 12, P)
    codes = sinkhorn(scores, epsilon, iterations)
    close(codes, torch.stack([plain_codes(s, epsilon, iterations) for s in scores]))
    close(codes.sum(-1), torch.ones(2, 12, dtype=torch.float64))


def test_codes_share_the_prototypes_out_in_the_end():
    codes = sinkhorn(uniform(generator(1), 40, 5), 0.5, 300)
    close(codes.sum(0), torch.full((5,), 8.0, dtype=torch.float64))


def test_codes_are_stable_in_float32_where_exp_overflows():
    scores = uniform(generator(2), 64, 30)
    for epsilon in (0.05, 0.01, 0.002):  # exp(1/0.01) is more than float32 holds
        got = sinkhorn(scores.float(), epsilon, 3)
        want = sinkhorn(scores, epsilon, 3)
        assert got.dtype == torch.float32 and got.isfinite().all()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-4)
    half = sinkhorn(scores.bfloat16(), 0.05, 3)
    assert half.dtype == torch.float32


# ---- micro batches, ranks


def test_codes_of_micro_batches_share_one_queue():
    run = swav(bn=False)
    for step in range(3):
        run.step(step, *halves(crops(step, B, SIZES)))
    one = swav(bn=False)
    one.step(0, crops(0, B, SIZES))
    twin = swav(bn=False)
    twin.step(0, *halves(crops(0, B, SIZES)))
    close(twin.method.queues[0].rows, one.method.queues[0].rows)
    assert twin.method.filled == one.method.filled == 8 and twin.method.rows == []


CASES = {"no BN": dict(bn=False), "no BN, no queue": dict(bn=False, queue=0), "BN": {}}


def _steps(teacher, **options):
    run, out = swav(teacher, **options), []
    for step in range(5):  # the last two use the queue
        loss, *_ = run.step(step, crops(step, B, SIZES, mine(B)))
        out.append(
            (
                dist.all_mean(torch.tensor(loss, dtype=torch.float64)).item(),
                [g.numpy() for g in run.all_grads.values()],
                [q.rows.numpy().copy() for q in run.method.queues],
            )
        )
    return out


def _two_ranks():
    td.init_process_group("gloo")
    scores = uniform(generator(3), 2, 12, P)
    codes = sinkhorn(scores[:, mine(12)], 0.05, 3).numpy()
    out = {
        (name, teacher): _steps(teacher, **options)
        for name, options in CASES.items()
        for teacher in (False, True)
    }
    td.destroy_process_group()
    return codes, out


@pytest.fixture(scope="module")
def pair():
    return ranks(2, _two_ranks)


def test_codes_of_two_ranks_are_one_solution(pair):
    got = np.concatenate([codes for codes, _ in pair], 1)
    assert np.abs(got - sinkhorn(uniform(generator(3), 2, 12, P), 0.05, 3).numpy()).max() < 1e-14


@pytest.mark.parametrize("teacher", [False, True], ids=["swav", "disco"])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_rank_with_the_whole_batch(pair, name, teacher):
    # With batch norm, two groups that the ranks hold.
    one = _steps(teacher, groups=1 if "no BN" in name else 2, **CASES[name])
    for want, a, b in zip(one, pair[0][1][name, teacher], pair[1][1][name, teacher]):
        assert a[0] == b[0] == pytest.approx(want[0], rel=1e-10)
        for g, x, y in zip(want[1] + want[2], a[1] + a[2], b[1] + b[2]):
            assert np.array_equal(x, y) and np.abs(x - g).max() <= 1e-10 * max(1, np.abs(g).max())


# ---- golden losses


@pytest.mark.parametrize("teacher", [False, True], ids=["swav", "swav_disco"])
def test_golden_losses(teacher):
    run = swav(teacher, groups=2, distill=0.5)
    check_golden(
        "swav_disco" if teacher else "swav",
        [run.step(step, crops(step, B, SIZES))[0] for step in range(20)],
    )
