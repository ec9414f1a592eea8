"""SwAV's prototypes keep length 1, and DINO's gain its decay, at any ZeRO stage and from checkpoints
of before."""

import copy

import pytest
import torch
from conftest import ranks
from torch import nn

from fastdisco import engine, models
from fastdisco.common import dist
from fastdisco.config import Engine, Optim
from fastdisco.engine import optim
from fastdisco.models import heads

STEPS, BATCH = 4, 4
ADAMW = Optim(name="adamw", weight_decay=0.1, decay_norm_and_bias=False)


def _net(kind):
    """Of sizes that 2 does not divide: a row of the prototypes lies on both ranks."""
    torch.manual_seed(0)
    return models.Net(
        nn.Sequential(nn.Flatten(), nn.Linear(15, 7), nn.Tanh()), heads.mlp(7, 5, 3), kind(3, 7)
    )


def _gained(dim, count):
    return heads.LastLayer(dim, count, gain=True)


def _started(kind, stage):
    net = _net(kind)
    optimizer = optim.create(net, ADAMW, 0.1, stage)
    micro = BATCH // dist.world()
    return engine.create(net, optimizer, Engine(stage=stage, bucket_mb=1e-4), micro, 1, 0.0)


def _train(student, steps):
    for step in steps:
        g = torch.Generator().manual_seed(step)
        n = BATCH // dist.world()
        views = torch.randn(2, BATCH, 3, 1, 5, generator=g)[:, dist.rank() * n :][:, :n]
        targets = torch.randn(2, BATCH, 7, generator=g)[:, dist.rank() * n :][:, :n]
        loss = (student(list(views)).scores * targets).mean()
        student.backward(loss)
        student.step()
    return engine.weights(student)


def _as_before(weights, state):
    """Weights and optimizer state as checkpoints of before have them: rows of any length, a gain
    of one dimension."""
    weights, state = dict(weights), copy.deepcopy(state)
    if "prototypes.gain" not in weights:
        lengths = torch.linspace(0.3, 3, 7)[:, None]
        weights["prototypes.weight"] = weights["prototypes.weight"] * lengths
        return weights, state
    weights["prototypes.gain"] = weights["prototypes.gain"][:, 0]
    of_gain = state["parameters"]["prototypes.gain"]
    for key, value in of_gain.items():
        of_gain[key] = value[:, 0] if value.dim() else value
    return weights, state


def _every_stage():
    engine.start(Engine())
    out = {}
    for kind in (heads.Prototypes, _gained):
        for stage in range(4):
            student = _started(kind, stage)
            _train(student, range(STEPS))
            saved = copy.deepcopy((engine.weights(student), engine.optimizer_state(student)))
            end = _train(student, range(STEPS, 2 * STEPS))
            other = _started(kind, stage)
            weights, state = _as_before(*saved)
            engine.load_weights(other, weights)
            engine.load_optimizer_state(other, state)
            continued = _train(other, range(STEPS, 2 * STEPS))
            out[kind.__name__, stage] = [
                {k: v.tolist() for k, v in w.items()} for w in (saved[0], end, continued)
            ]
    engine.stop()
    return out


@pytest.fixture(scope="module")
def found():
    return ranks(2, _every_stage)[0]


@pytest.mark.parametrize("kind", ["Prototypes", "_gained"])
@pytest.mark.parametrize("stage", range(4))
def test_every_stage_moves_them_alike_and_checkpoints_of_before_continue(found, kind, stage):
    near = lambda a, b: [
        torch.testing.assert_close(torch.tensor(a[k]), torch.tensor(b[k]), rtol=1e-4, atol=1e-5)
        for k in a | b
    ]
    saved, end, continued = found[kind, stage]
    near(saved, found[kind, 0][0])
    near(end, found[kind, 0][1])
    near(continued, end)
    length = torch.tensor(end["prototypes.weight"]).norm(dim=1)
    if kind == "Prototypes":
        torch.testing.assert_close(length, torch.ones(7))
    else:
        assert (length - 1).abs().max() > 0.1


def test_dinos_gain_decays_as_in_its_code():
    """There it has the shape [P,1], and all but vectors decay."""
    net = _net(_gained)
    groups = optim.create(net, ADAMW, 0.1).param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = {n for n, p in net.named_parameters() if id(p) in decayed}
    assert {"prototypes.gain", "prototypes.weight"} <= names and not any("bias" in n for n in names)
