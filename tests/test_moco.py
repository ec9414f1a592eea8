"""MoCo and DisCo's step against formulas written out in float64, on one and two ranks, in micro
batches, and against golden losses."""

import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as td
from conftest import ranks
from torch import nn

from fastdisco import config, methods, models
from fastdisco.common import dist
from fastdisco.engine import optim
from fastdisco.methods import Nets, Progress, spread
from fastdisco.teacher import Teacher

pytestmark = pytest.mark.usefixtures("unwritten")

GOLDEN = Path(__file__).parent / "golden"
DIM, HIDDEN, SIZE = 6, 10, 8
# Larger than the recipe's, so that a wrong order or a forgotten term shows.
LR, DECAY, EMA = 0.1, 1e-2, 0.9


def uniform(rng, *shape):
    """-1..1, from PCG64's doubles: the same on every machine."""
    return torch.from_numpy(rng.random(shape) * 2 - 1)


def parts(rng, bn, width):
    """Backbone and head in float64, every weight and running statistic drawn."""
    norm = nn.BatchNorm2d if bn else (lambda c: nn.Identity())
    backbone = nn.Sequential(
        nn.Conv2d(3, width, 3, 2, bias=not bn),
        norm(width),
        nn.ReLU(),
        nn.Conv2d(width, 8, 3),
        norm(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    head = nn.Sequential(nn.Linear(8, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM))
    for module in (backbone.double(), head.double()):
        for x in module.state_dict().values():
            if x.is_floating_point():
                x.copy_(uniform(rng, *x.shape) if x.ndim > 1 else 1 + 0.5 * uniform(rng, *x.shape))
    return backbone, head


class Run:
    """What train.py builds and does, without engine and data."""

    def __init__(self, bn=True, groups=1, teacher=False, shuffle=True, queue=10, seed=7, **cfg):
        rng = np.random.Generator(np.random.PCG64(seed))
        # For the formulas.
        self.plain_student, self.plain_teacher = (
            nn.Sequential(*parts(rng, bn, 4)),
            nn.Sequential(*parts(rng, True, 5)),
        )
        self.net = models.Net(*copy.deepcopy(self.plain_student))
        models.split_bn(self.net, groups)
        self.ema = models.ema_copy(self.net)
        self.teacher = Teacher(models.Net(*copy.deepcopy(self.plain_teacher))) if teacher else None
        cfg = config.Moco(queue=queue, momentum=EMA, **cfg)
        self.method = methods.create(
            "moco",
            cfg=cfg,
            dim=DIM,
            seed=seed,
            shuffle=shuffle if isinstance(shuffle, str) else "gather" if shuffle else "off",
        ).double()
        rows = uniform(rng, queue, DIM)
        self.method.queue.rows.copy_(rows / rows.square().sum(1, keepdim=True).sqrt())
        self.optimizer = optim.create(self.net, config.Optim(weight_decay=DECAY), LR)
        self.asked = []  # what the mean student saw

    def terms(self, views, step):
        def ema(views):
            self.asked.append(views[0])
            with torch.no_grad():
                return self.ema(views)

        return self.method.step(Nets(self.net, ema, self.teacher), views, Progress(step, 0.0))

    def step(self, step, *micro_batches):
        """One optimizer step; returns its loss, gradients and terms of the last micro batch."""
        self.optimizer.zero_grad()
        total = 0.0
        for i, views in enumerate(micro_batches):
            terms = self.terms(views, step * len(micro_batches) + i)
            loss = self.method.loss(terms) / len(micro_batches)
            loss.backward()
            total += loss.item()
        for p in self.net.parameters():
            dist.all_mean(p.grad)
        grads = [p.grad.clone() for p in self.net.parameters()]
        self.optimizer.step()
        models.ema_update(self.ema, self.net, self.method.momentum(Progress(step, 0.0)))
        self.method.after_step()
        return total, grads, terms


def batch(seed, b, share=slice(None)):
    rng = np.random.Generator(np.random.PCG64([99, seed]))
    image = uniform(rng, b, 3, SIZE, SIZE)
    return [(image + 0.3 * uniform(rng, b, 3, SIZE, SIZE))[share] for _ in range(2)]


# ---- the published formulas


class Paper:
    """The method of the papers in plain torch and float64; statistics are of `groups` slices, as
    the ranks of the published code have them."""

    def __init__(self, student, teacher, queue, groups, temp):
        self.student, self.teacher, self.groups, self.temp = (
            student.train(),
            teacher and teacher.eval(),
            groups,
            temp,
        )
        self.mean_student = copy.deepcopy(student)
        self.weights, self.means = (
            list(self.student.parameters()),
            list(self.mean_student.parameters()),
        )
        self.velocity = [torch.zeros_like(p) for p in self.weights]
        self.queue, self.at = list(queue.clone()), 0

    def forward(self, net, x):
        z = torch.cat([net(part) for part in x.chunk(self.groups)])
        return z / z.square().sum(1, keepdim=True).sqrt()

    def step(self, a, b, order):
        """order: the permutation in which the mean student sees view B."""
        qa = self.forward(self.student, a)
        with torch.no_grad():
            # As published: before the keys, by the weights before this step's update.
            for mean, weight in zip(self.means, self.weights):
                mean.copy_(EMA * mean + (1 - EMA) * weight)
            k = torch.empty_like(qa)
            k[order] = self.forward(self.mean_student, b[order])
        negatives = torch.stack(self.queue)
        contrast = 0
        for i in range(len(a)):
            positive = torch.exp(qa[i] @ k[i] / self.temp)
            contrast -= torch.log(
                positive / (positive + torch.exp(negatives @ qa[i] / self.temp).sum())
            ) / len(a)
        distill = torch.zeros(())
        if self.teacher:
            with torch.no_grad():
                ta, tb = (self.teacher(v) for v in (a, b))
                ta, tb = (t / t.square().sum(1, keepdim=True).sqrt() for t in (ta, tb))
            distill = (
                (ta - qa).square().sum() + (tb - self.forward(self.student, b)).square().sum()
            ) / len(a)
        loss = contrast + 32 * distill
        grads = torch.autograd.grad(loss, self.weights)
        with torch.no_grad():
            for p, v, g in zip(self.weights, self.velocity, grads):
                v.copy_(0.9 * v + g + DECAY * p)
                p -= LR * v
        for key in k:
            self.queue[self.at] = key
            self.at = (self.at + 1) % len(self.queue)
        return loss.item(), contrast.item(), distill.item(), grads


@pytest.mark.parametrize("teacher", [False, True], ids=["moco", "disco"])
@pytest.mark.parametrize("groups, shuffle", [(1, False), (1, True), (2, True), (4, True)])
def test_three_steps_are_those_of_the_papers(teacher, groups, shuffle):
    run = Run(groups=groups, teacher=teacher, shuffle=shuffle)  # 10 keys: the second step wraps
    assert run.method.weights == {"contrast": 1.0, "distill": 32.0}
    paper = Paper(
        run.plain_student,
        run.plain_teacher if teacher else None,
        run.method.queue.rows,
        groups,
        0.2,
    )
    for step in range(3):
        a, b = batch(step, 8)
        loss, grads, terms = run.step(step, [a, b])
        seen = run.asked[-1].flatten(1)
        # Which image the mean student saw where.
        order = (seen[:, None] == b.flatten(1)).all(2).long().argmax(1)
        assert sorted(order.tolist()) == list(range(8)) and torch.equal(seen, b.flatten(1)[order])
        assert shuffle != (order.tolist() == list(range(8)))
        want = paper.step(a, b, order)
        assert loss == pytest.approx(want[0], rel=1e-10) and terms[
            "contrast"
        ].item() == pytest.approx(want[1], rel=1e-10)
        assert ("distill" in terms) == teacher
        if teacher:
            assert terms["distill"].item() == pytest.approx(want[2], rel=1e-10)
            # ||s-t||^2 = 2 - 2 cos, two views; for the log.
            assert terms["distill/cosine"].item() == pytest.approx(1 - want[2] / 4, abs=1e-6)
        close = dict(rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(grads, list(want[3]), **close)
        torch.testing.assert_close(list(run.net.parameters()), paper.weights, **close)
        torch.testing.assert_close(run.method.queue.rows, torch.stack(paper.queue), **close)
        assert int(run.method.queue.ptr) == paper.at == 8 * (step + 1) % 10
        # Ours stands where the next step's would begin.
        moved = [EMA * m + (1 - EMA) * w for m, w in zip(paper.means, paper.weights)]
        torch.testing.assert_close(list(run.ema.parameters()), moved, **close)


def test_only_the_student_gets_a_gradient_and_the_teacher_stays():
    run = Run(teacher=True)
    before = copy.deepcopy(run.teacher.net.state_dict())
    for step in range(3):
        run.step(step, batch(step, 8))
    # Running statistics too.
    assert all(torch.equal(before[k], v) for k, v in run.teacher.net.state_dict().items())
    assert not any(p.requires_grad for net in (run.ema, run.teacher.net) for p in net.parameters())
    assert all(p.grad.abs().max() > 0 for p in run.net.parameters())


def test_the_state_of_the_method_is_its_queue():
    run, twin = Run(), Run(seed=8)
    run.step(0, batch(0, 8))
    twin.method.load_state_dict(run.method.state_dict())
    assert sorted(run.method.state_dict()) == ["queue.ptr", "queue.rows"] and not list(
        run.method.parameters()
    )
    for x in (run, twin):
        x.method.queue.enqueue(torch.eye(DIM))
    assert torch.equal(run.method.queue.rows, twin.method.queue.rows)


def test_the_spread_is_1_for_spread_rows_and_0_for_collapsed_ones():
    run = Run(bn=False)
    logged = run.terms(batch(0, 8), 0)["feat/std"].item()
    q = run.plain_student(batch(0, 8)[0]).detach()
    q = q / q.norm(dim=1, keepdim=True)
    assert logged == pytest.approx(
        (q - q.mean(0)).square().mean(0).sqrt().mean().item() * math.sqrt(DIM), rel=1e-5
    )
    wide, one = (
        torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)),
        torch.ones(4096, 64),
    )
    assert spread(wide).item() == pytest.approx(1, abs=0.02) and spread(
        one
    ).item() == pytest.approx(0, abs=1e-6)


# ---- the queue's rows as negatives


def _contrast(rows, temp=0.2):
    run = Run(queue=len(rows), temp=temp)
    run.method.queue.rows.copy_(rows)
    return run, run.terms(batch(0, 8), 0)["contrast"].item()


@pytest.mark.parametrize("temp", [0.02, 0.2])
def test_the_order_of_the_queue_does_not_matter_and_a_second_copy_of_a_negative_counts_twice(temp):
    rows = Run(queue=24).method.queue.rows
    run, loss = _contrast(rows, temp)
    _, permuted = _contrast(
        rows[torch.randperm(24, generator=torch.Generator().manual_seed(0))], temp
    )
    assert permuted == pytest.approx(loss, rel=1e-12)
    q, k = run.plain_student(batch(0, 8)[0]), copy.deepcopy(run.plain_student)(batch(0, 8)[1])
    q, k = (x / x.norm(dim=1, keepdim=True) for x in (q, k))
    e = torch.exp(torch.cat([(q * k).sum(1, keepdim=True), q @ rows.T], 1) / temp)
    nearest = e[0, 1:].argmax()
    _, more = _contrast(torch.cat([rows, rows[nearest, None]]), temp)
    assert more > loss + 1e-6 and more - loss == pytest.approx(
        torch.log(1 + e[:, 1 + nearest] / e.sum(1)).mean().item(), rel=1e-8
    )


# ---- micro batches


@pytest.mark.parametrize("teacher", [False, True], ids=["moco", "disco"])
def test_two_micro_batches_are_one_batch(teacher):
    one, two = (Run(bn=False, teacher=teacher, queue=12) for _ in range(2))
    for step in range(3):
        whole = batch(step, 8)
        halves = [[v[:4] for v in whole], [v[4:] for v in whole]]
        want, got = one.step(step, whole), two.step(step, *halves)
        assert got[0] == pytest.approx(want[0], rel=1e-10)
        torch.testing.assert_close(got[1], want[1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            two.method.queue.rows, one.method.queue.rows, rtol=1e-12, atol=1e-12
        )
        assert two.method.queue.ptr == one.method.queue.ptr and two.method.keys == []


# ---- two ranks

CASES = {
    "no BN": dict(bn=False),
    "no BN, shuffled": dict(bn=False, shuffle=True),
    "BN": dict(),
    "BN, shuffled": dict(shuffle=True),
}


def _steps(teacher, shuffle=False, groups=1, **options):
    """3 steps of this rank's share of 8 images: losses averaged over ranks, gradients, queue."""
    run = Run(teacher=teacher, shuffle=shuffle, groups=groups, queue=20, **options)
    share = slice(dist.rank() * 8 // dist.world(), (dist.rank() + 1) * 8 // dist.world())
    out = []
    for step in range(3):
        loss, grads, _ = run.step(step, batch(step, 8, share))
        out.append(
            (
                dist.all_mean(torch.tensor(loss, dtype=torch.float64)).item(),
                [g.numpy() for g in grads],
                run.method.queue.rows.numpy().copy(),
                int(run.method.queue.ptr),
            )
        )
    return out


def _two_ranks():
    td.init_process_group("gloo")
    assert td.get_world_size() == dist.world() == 2 and td.get_rank() == dist.rank()
    results = {
        (name, teacher): _steps(teacher, **options)
        for name, options in CASES.items()
        for teacher in (False, True)
    }
    # Images 0..5 of two numbers, three on each rank.
    x = torch.arange(12).reshape(6, 2)[dist.rank() * 3 :][:3]
    shuffles = []
    for seed in range(20):
        shuffle = dist.Shuffle(3, seed)
        mine = shuffle.split(x)
        shuffles.append(
            (mine.numpy(), shuffle.join(mine)().numpy(), shuffle.join(10 * mine.double())().numpy())
        )
    td.destroy_process_group()
    return results, shuffles


@pytest.fixture(scope="module")
def pair():
    return ranks(2, _two_ranks)


@pytest.mark.parametrize("teacher", [False, True], ids=["moco", "disco"])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_rank_with_the_whole_batch(pair, name, teacher):
    # With batch norm the one rank has two groups, which are the slices that the ranks hold.
    one = _steps(teacher, groups=1 if "no BN" in name else 2, **CASES[name])
    first, second = (results[name, teacher] for results, _ in pair)
    for want, a, b in zip(one, first, second):
        assert a[0] == b[0] == pytest.approx(want[0], rel=1e-10)
        for g, x, y in zip(want[1], a[1], b[1]):
            assert np.array_equal(x, y) and np.abs(x - g).max() <= 1e-10 * max(1, np.abs(g).max())
        # Rank 0's keys before rank 1's.
        assert np.array_equal(a[2], b[2]) and np.abs(a[2] - want[2]).max() < 1e-10
        assert a[3] == b[3] == want[3]


def test_shuffling_changes_the_statistics_of_the_keys_alone(pair):
    results = pair[0][0]
    # Of the first step, which begins with the same weights.
    keys = {name: results[name, True][0][2][:8] for name in CASES}
    assert np.abs(keys["BN"] - keys["BN, shuffled"]).max() > 1e-3
    assert np.abs(keys["no BN"] - keys["no BN, shuffled"]).max() < 1e-12


def test_a_shuffle_hands_every_image_to_one_rank_and_is_undone(pair):
    images, crossed, orders = np.arange(12).reshape(6, 2), 0, set()
    for (mine, joined, tenfold), (other, joined_there, _) in zip(pair[0][1], pair[1][1]):
        given = np.concatenate([mine, other])
        assert sorted(given.tolist()) == images.tolist()
        assert (
            np.array_equal(joined, images)
            and np.array_equal(joined_there, images)
            and np.array_equal(tenfold, 10 * images)
        )
        crossed += (mine[:, 0] >= 6).sum()
        orders.add(tuple(given[:, 0]))
    # Of 60, half come from the other rank; 20 seeds give different permutations.
    assert 15 < crossed < 45 and len(orders) > 15


def test_the_permutation_changes_with_step_and_seed_and_not_else():
    def order(step, **options):
        run = Run(**options)
        run.terms(batch(0, 8), step)
        return run.asked[0]

    assert torch.equal(order(3), order(3))
    assert not torch.equal(order(3), order(4)) and not torch.equal(order(3), order(3, seed=8))


# ---- golden losses


@pytest.mark.parametrize(
    "name, options", [("moco", dict(shuffle=False)), ("moco_disco", dict(groups=2, teacher=True))]
)
def test_golden_losses(name, options):
    runs = []
    threads = torch.get_num_threads()
    try:
        for n, steps in ((1, 20), (2, 5)):
            torch.set_num_threads(n)
            run = Run(queue=50, **options)  # 8 keys a step: wraps three times
            runs.append([run.step(step, batch(step, 8))[0] for step in range(steps)])
    finally:
        torch.set_num_threads(threads)
    assert runs[0][:5] == pytest.approx(runs[1], rel=1e-9)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("FASTDISCO_WRITE_GOLDEN") == "1":
        path.write_text("".join(f"{step} {loss!r}\n" for step, loss in enumerate(runs[0])))
    golden = [
        (int(step), float(loss))
        for step, loss in (line.split() for line in path.read_text().splitlines())
    ]
    assert list(enumerate(runs[0])) == [
        (step, pytest.approx(loss, rel=1e-7)) for step, loss in golden
    ], (
        f"{path.name} differs: if the change is meant to alter numbers, write it anew with "
        "FASTDISCO_WRITE_GOLDEN=1 and say why in the commit"
    )
