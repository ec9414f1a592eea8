"""The training loop of train.py without engine and data, on tiny networks in float64 whose every
number is drawn: what the methods' tests share."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastdisco import config, methods, models
from fastdisco.common import dist
from fastdisco.engine import optim
from fastdisco.methods import Nets, Progress
from fastdisco.models import heads
from fastdisco.teacher import Teacher

GOLDEN = Path(__file__).parent / "golden"
DIM, HIDDEN = 6, 10


def generator(*seed):
    return np.random.Generator(np.random.PCG64(seed))


def uniform(rng, *shape):
    """-1..1, from PCG64's doubles: the same on every machine."""
    return torch.from_numpy(rng.random(shape) * 2 - 1)


def drawn(module, rng):
    """The module in float64, every weight and running statistic drawn."""
    for x in module.double().state_dict().values():
        if x.is_floating_point():
            x.copy_(uniform(rng, *x.shape) if x.ndim > 1 else 1 + 0.5 * uniform(rng, *x.shape))
    return module


def backbone(rng, bn, width=4):
    norm = nn.BatchNorm2d if bn else (lambda c: nn.Identity())
    return drawn(
        nn.Sequential(
            nn.Conv2d(3, width, 3, 2, bias=not bn),
            norm(width),
            nn.ReLU(),
            nn.Conv2d(width, 8, 3),
            norm(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        rng,
    )


def crops(seed, b, sizes, share=slice(None)):
    """Views of b images, one per size."""
    rng = generator(99, seed)
    image = uniform(rng, b, 3, 16, 16)
    return [(image[:, :, :s, :s] + 0.3 * uniform(rng, b, 3, s, s))[share] for s in sizes]


class Run:
    """A method with its networks and optimizer; `plain` and `plain_teacher` are the same networks,
    to compute formulas with."""

    def __init__(
        self,
        block,
        head,
        told: config.Optim,
        teacher=None,
        epochs=4,
        per_epoch=5,
        bn=True,
        groups=1,
        joint=False,
        seed=7,
    ):
        """head, teacher: functions of a generator that make a head, the teacher's on a backbone of
        its own."""
        rng = generator(seed)
        self.plain = nn.Sequential(backbone(rng, bn), head(rng))
        self.plain_teacher = (
            nn.Sequential(backbone(rng, True, 5), teacher(rng)).eval() if teacher else None
        )
        self.net = models.Net(*copy.deepcopy(self.plain), joint=joint)
        if count := getattr(block, "prototypes", 0):
            kind = heads.LastLayer if block.name == "dino" else heads.Prototypes
            self.net.prototypes = prototypes = drawn(kind(DIM, count), rng)
            # Loading scales the rows of SwAV's to length 1, as its code does before a forward.
            prototypes.load_state_dict(prototypes.state_dict())
            self.plain_prototypes = self.net.prototypes.weight.detach().clone()
        models.split_bn(self.net, groups)
        self.method = methods.create(
            block.name, cfg=block, dim=DIM, seed=seed, shuffle="off"
        ).double()
        self.ema = (
            None if self.method.momentum(Progress(0, 0.0)) is None else models.ema_copy(self.net)
        )
        self.teacher = Teacher(models.Net(*copy.deepcopy(self.plain_teacher))) if teacher else None
        self.told, self.epochs, self.per_epoch = told, epochs, per_epoch
        self.optimizer = optim.create(self.net, told, told.lr)

    def step(self, step, *micro_batches):
        """One optimizer step; returns its loss, gradients by name (those of frozen weights None)
        and terms of the last micro batch."""
        nets = Nets(
            self.net,
            self.ema and torch.no_grad()(self.ema),
            self.teacher,
            self.net.prototypes and torch.no_grad()(self.net.prototypes),
        )
        epoch = step / self.per_epoch
        optim.move(
            self.optimizer,
            optim.rate(self.told, self.told.lr, epoch, self.epochs),
            optim.decay(self.told, epoch, self.epochs),
        )
        self.optimizer.zero_grad()
        total = 0.0
        for i, views in enumerate(micro_batches):
            progress = Progress(step * len(micro_batches) + i, epoch / self.epochs, epoch, step)
            terms = self.method.step(nets, views, progress)
            loss = self.method.loss(terms) / len(micro_batches)
            loss.backward()
            total += loss.item()
        for p in self.net.parameters():
            dist.all_mean(p.grad)
        self.all_grads = {n: p.grad.clone() for n, p in self.net.named_parameters()}
        optim.freeze(self.net, self.method.frozen(progress))
        grads = {
            n: p.grad if p.grad is None else p.grad.clone() for n, p in self.net.named_parameters()
        }
        self.optimizer.step()
        if self.ema:
            models.ema_update(self.ema, self.net, self.method.momentum(progress))
        self.method.after_step()
        return total, grads, terms


def halves(views):
    return [[v[: len(v) // 2] for v in views], [v[len(v) // 2 :] for v in views]]


def mine(b):
    """This rank's share of b images."""
    return slice(dist.rank() * b // dist.world(), (dist.rank() + 1) * b // dist.world())


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def check_golden(name, losses):
    """20 losses against tests/golden/<name>.txt; FASTDISCO_WRITE_GOLDEN=1 writes them anew."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("FASTDISCO_WRITE_GOLDEN") == "1":
        path.write_text("".join(f"{step} {loss!r}\n" for step, loss in enumerate(losses)))
    golden = [
        (int(step), float(loss))
        for step, loss in (line.split() for line in path.read_text().splitlines())
    ]
    assert len(golden) == 20 and list(enumerate(losses)) == [
        (step, pytest.approx(loss, rel=1e-7)) for step, loss in golden
    ], (
        f"{path.name} differs: if the change is meant to alter numbers, write it anew with "
        "FASTDISCO_WRITE_GOLDEN=1 and say why in the commit"
    )
