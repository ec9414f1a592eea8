"""Fine-tuning: torch's own training written out, and exact resume."""

import pytest
import torch
import torch.distributed as td
from conftest import ranks
from torch import nn

from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.evals.finetune import Tuning, report
from fastdisco.evals.protocols import Protocol

P = Protocol(epochs=4, batch=8, lr=0.2, trunk_lr=0.05, milestones=(1, 3), factor=0.2, init="torch")


def backbone(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(dropout))


def data():
    g = torch.Generator().manual_seed(1)
    y = torch.arange(30) % 3
    return torch.randn(30, 6, generator=g) + torch.eye(6)[y], y


def source(epoch, start):
    x, y = data()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(epoch))
    for rows in list(order.split(8))[start:]:
        yield x[rows], y[rows]


def val(net):
    return net(data()[0]), data()[1]


def tuned(body, watch=lambda t: None, saved=None):
    t = Tuning(body, 12, 3, P, seed=3)
    if saved:
        t.load_state_dict(saved)
    t.run(source, val, watch)
    return t


def test_it_is_what_torch_trains_with_two_rates():
    body = backbone()
    before = {k: v.clone() for k, v in body.state_dict().items()}
    got = tuned(body)
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())
    first = Tuning(body, 12, 3, P, seed=3).net
    net = nn.Sequential(backbone(), nn.Linear(12, 3))
    net[1].load_state_dict(first[1].state_dict())
    sgd = torch.optim.SGD(
        [{"params": net[0].parameters()}, {"params": net[1].parameters(), "lr": 0.2}],
        lr=0.05,
        momentum=0.9,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [1, 3], gamma=0.2)
    accuracies = []
    for epoch in range(4):
        net.train()
        for x, y in source(epoch, 0):
            sgd.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            sgd.step()
        schedule.step()
        accuracies.append((net.eval()(data()[0]).argmax(1) == data()[1]).double().mean().item())
    for a, b in zip(got.net.state_dict().values(), net.state_dict().values()):
        torch.testing.assert_close(a, b)
    assert got.curves["val"] == pytest.approx(accuracies)
    assert report(got)["finetune_top1_last"] == accuracies[-1] > 0.5
    assert report(got)["finetune_top1_best_on_val"] == max(accuracies)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("calls", [2, 5, 12])  # 4 steps and the end of an epoch make 5
def test_a_resumed_fine_tuning_ends_the_same(calls, tmp_path):
    def watch(t):
        left[0] -= 1
        if not left[0]:
            torch.save(t.state_dict(), tmp_path / "state.pt")
            raise Stopped

    left, body = [calls], backbone(dropout=0.3)
    with pytest.raises(Stopped):
        tuned(body, watch)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.manual_seed(99)
    whole, resumed = tuned(body), tuned(body, saved=saved)
    for a, b in zip(whole.net.state_dict().values(), resumed.net.state_dict().values()):
        assert torch.equal(a, b)
    assert whole.curves == resumed.curves


def mine(x):
    return x.tensor_split(dist.world())[dist.rank()]


def _part():
    """A rank's part of every batch; what it ends with."""
    td.init_process_group("gloo")
    t = Tuning(backbone(), 12, 3, P, seed=3)
    t.run(
        lambda epoch, start: ((mine(x), mine(y)) for x, y in source(epoch, start)),
        lambda net: tuple(map(mine, val(net))),
    )
    return {k: v.tolist() for k, v in t.net.state_dict().items()}, t.curves["val"]


def test_two_ranks_are_one():
    """Batch norm takes its statistics over both."""
    whole = tuned(backbone())
    for weights, accuracies in ranks(2, _part):
        assert weights.keys() == whole.net.state_dict().keys()
        for name, want in whole.net.state_dict().items():
            got = torch.tensor(weights[name], dtype=want.dtype)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert accuracies == pytest.approx(whole.curves["val"])


def test_one_that_diverges_is_refused():
    t = Tuning(backbone(), 12, 3, P.model_copy(update={"lr": 1e30, "trunk_lr": 1e30}), seed=3)
    t.run(source, val)
    with pytest.raises(UserError, match="the training diverged"):
        report(t)
