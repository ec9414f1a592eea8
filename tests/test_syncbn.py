"""Batch norm over all ranks against plain batch norm of their joined batch, and its waits."""

import copy

import pytest
import torch
import torch.distributed as td
from conftest import ranks
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdisco import models
from fastdisco.common import dist

RANKS, B, C = 2, 4, 6
KINDS = {
    "1d": (lambda: nn.BatchNorm1d(C), (C,)),
    "2d": (lambda: nn.BatchNorm2d(C), (C, 5, 3)),
    "2d and activation": (lambda: BatchNormAct2d(C), (C, 5, 3)),
    "no affine, average": (lambda: nn.BatchNorm2d(C, affine=False, momentum=None), (C, 5, 3)),
    "no statistics": (lambda: nn.BatchNorm2d(C, track_running_stats=False), (C, 5, 3)),
}


class NoRead(TorchDispatchMode):
    """Raises where the host reads a value, for which on a GPU it would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a value"
        return func(*args, **kwargs or {})


def layer(kind, dtype):
    torch.manual_seed(0)
    norm = KINDS[kind][0]().to(dtype)
    with torch.no_grad():
        for x in norm.parameters():
            x.uniform_(0.5, 2)
    return nn.Sequential(norm)


def images(kind, dtype):
    """The joined batch, whose ranks differ much in mean and spread, and the loss's weights."""
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(RANKS * B, *KINDS[kind][1], generator=g, dtype=dtype) for _ in range(2))
    x[:B] = 3 * x[:B] + 5
    return x.requires_grad_(), w


def steps(net, x, w):
    """Two steps' outputs, gradients and buffers."""
    for _ in range(2):
        y = net(x)
        (y * w).sum().backward()
    return y.detach(), x.grad, [p.grad for p in net.parameters()], dict(net.named_buffers())


def _synced(kind, dtype):
    td.init_process_group("gloo")
    net = models.sync_bn(layer(kind, dtype))
    x, w = (t.detach()[dist.rank() * B :][:B].clone() for t in images(kind, dtype))
    with NoRead():
        y, dx, dws, buffers = steps(net, x.requires_grad_(), w)
    whole = [dist.all_sum(dw.clone()) for dw in dws]
    return [t.tolist() for t in (dist.all_gather(y), dist.all_gather(dx), *whole)], {
        k: b.tolist() for k, b in buffers.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_are_one_batch(kind):
    want = steps(layer(kind, torch.float64), *images(kind, torch.float64))
    for found, buffers in ranks(RANKS, _synced, kind, torch.float64):
        for got, true in zip(found, (want[0], want[1], *want[2])):
            torch.testing.assert_close(
                torch.tensor(got, dtype=torch.float64), true, rtol=1e-10, atol=1e-10
            )
        assert buffers.keys() == want[3].keys()
        for name, true in want[3].items():
            torch.testing.assert_close(
                torch.tensor(buffers[name], dtype=true.dtype), true, rtol=1e-10, atol=1e-12
            )


def _half():
    td.init_process_group("gloo")
    net = models.sync_bn(layer("2d", torch.float32)).to(memory_format=torch.channels_last)
    x = torch.randn(B, C, 5, 3).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    y = net(x)
    y.sum().backward()
    return y.dtype, x.grad.dtype, y.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_and_memory_format_stay():
    assert ranks(RANKS, _half)[0] == (torch.bfloat16, torch.bfloat16, True)


def test_one_rank_and_eval_are_plain(monkeypatch):
    plain = layer("2d", torch.float32)
    assert models.sync_bn(plain) is plain and type(plain[0]) is nn.BatchNorm2d
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr("fastdisco.models.batchnorm.dist.world", lambda: 2)
    synced = models.sync_bn(copy.deepcopy(plain)).eval()
    assert type(synced[0]) is not nn.BatchNorm2d
    x = images("2d", torch.float32)[0]
    assert torch.equal(synced(x), plain.eval()(x))
    assert synced.state_dict().keys() == plain.state_dict().keys()
