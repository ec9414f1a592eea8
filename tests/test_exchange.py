"""The exchange of gradients: the mean over ranks, in one order on all of them, sent while the
backward runs."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as td
from conftest import ranks
from torch import nn

from fastdisco.common import dist
from fastdisco.config import Engine, UserError
from fastdisco.engine import deepspeed_config
from fastdisco.engine.exchange import ALIGN, Exchange

pytestmark = pytest.mark.usefixtures("unwritten")


class Net(nn.Module):
    """Two convolutions beside one another before a third, and a weight that nothing uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x, swap=False):
        # The backward runs the other way round.
        a, b = (self.right(x), self.left(x)) if swap else (self.left(x), self.right(x))
        return self.last((a * 2 + b if not swap else a + b * 2).tanh())


def _batch(rank, i):
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(10 * rank + i))


def _loss(net, rank, micro=0, swap=False):
    """Two forwards in one backward, as for two views."""
    return sum((net(_batch(rank, 10 * micro + i), swap) + i).square().mean() for i in range(2))


def _expected(micros=1):
    """The mean over two ranks of what plain autograd gives."""
    grads = []
    for rank in range(2):
        net = Net()
        sum(_loss(net, rank, m) for m in range(micros)).backward()
        grads.append([p.grad for p in net.parameters()])
    return [a if a is None else (a + b) / 2 for a, b in zip(*grads)]


def _exchanged(bucket_bytes, micros, swap_on=None):
    """[gradients after each of 2 steps], buckets sent before the first layer's gradient, kinds of
    the gradients."""
    td.init_process_group("gloo")
    net, now = Net().to(memory_format=torch.channels_last), {"last": False}
    exchange = Exchange(net, bucket_bytes, lambda: now["last"])
    ran, early = {}, []
    for name, p in net.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda _, name=name: ran.update({name: ran.get(name, 0) + 1})
        )
    net.left.weight.register_hook(lambda _: early.append(exchange.sent))
    found = []
    for _ in range(2):
        net.zero_grad()
        for m in range(micros):
            now["last"] = m == micros - 1
            _loss(net, dist.rank(), m, swap_on == dist.rank()).backward()
            exchange.finish()
        found.append([p.grad if p.grad is None else p.grad.tolist() for p in net.parameters()])
    inside = [
        any(
            p.grad.untyped_storage().data_ptr() == b.flat.untyped_storage().data_ptr()
            for b in exchange.buckets
        )
        and p.grad.stride() == p.stride()
        and p.grad.storage_offset() % ALIGN == 0
        for p in net.parameters()
        if p.grad is not None
    ]
    td.destroy_process_group()
    return found, early, len(exchange.buckets), ran, all(inside)


@pytest.mark.parametrize("bucket_bytes, buckets", [(1, 7), (400, 3), (10**6, 1)])
@pytest.mark.parametrize(
    "micros, swap_on",
    [(1, None), (1, 1), (3, None)],
    ids=["one", "another order on rank 1", "three micro batches"],
)
def test_gradients_are_the_mean_over_ranks_and_views_into_the_buckets(
    bucket_bytes, buckets, micros, swap_on
):
    results = ranks(2, _exchanged, bucket_bytes, micros, swap_on)
    want = _expected(micros)
    for found, _, n, ran, inside in results:
        assert n == buckets and inside
        assert set(ran.values()) == {2 * micros}, (
            "a weight that two forwards used is to be counted once a backward"
        )
        for grads in found:
            for g, w in zip(grads, want, strict=True):
                assert (g is None) == (w is None)
                if w is not None:
                    torch.testing.assert_close(torch.tensor(g), w, rtol=1e-5, atol=1e-7)
    assert results[0][0] == results[1][0]  # to the last bit


def test_buckets_go_out_while_the_backward_runs_and_only_in_the_last_micro_batch():
    _, early, *_ = ranks(2, _exchanged, 1, 2)[0]
    assert early[0] == early[2] == 0  # the first of two micro batches, in both steps
    # The last layer's weight and bias, when the first layer's gradient comes.
    assert early[1] >= 2 and early[3] >= 2


def _never_gathered():
    """Whether rows that no rank has sent are NaN."""
    dist._GATHER = lambda out, x, async_op: SimpleNamespace(wait=lambda: None)
    return bool(dist.all_gather(torch.ones(2, 3)).isnan().all())


def test_an_element_that_nothing_writes_shows():
    x = torch.ones(2, 3)
    for new in (torch.empty(2), torch.empty_like(x), x.new_empty(2), torch.empty_strided([2], [1])):
        assert new.isnan().all()
    assert ranks(2, _never_gathered) == [True, True]


def _on_gpus():
    """This rank's gradients of a second step in which the host may not wait, and the keys of a
    shuffled batch back in order."""
    torch.cuda.set_device(dist.device())
    torch.backends.cudnn.allow_tf32 = False
    td.init_process_group("nccl")
    net = Net().to(dist.device(), memory_format=torch.channels_last)
    exchange = Exchange(net, 1, lambda: True)
    inputs = [_batch(dist.rank(), i).to(dist.device()) for i in range(2)]
    rows = torch.arange(8, device=dist.device()).view(2, 2, 2) + 8 * dist.rank()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        net.zero_grad()
        sum((net(x) + i).square().mean() for i, x in enumerate(inputs)).backward()
        exchange.finish()
        order = dist.Shuffle(2, 1)
        keys = order.join(order.split(rows))()
    torch.cuda.set_sync_debug_mode("default")
    out = (
        [p.grad if p.grad is None else p.grad.tolist() for p in net.parameters()],
        keys.flatten().tolist(),
    )
    td.destroy_process_group()
    return out


@pytest.mark.gpu
def test_gpus_exchange_without_a_wait_of_the_host():
    if torch.cuda.device_count() < 2:
        pytest.skip("gpu: needs two")
    for grads, keys in ranks(2, _on_gpus):
        assert keys == list(range(16))
        for g, w in zip(grads, _expected(), strict=True):
            assert (g is None) == (w is None)
            if w is not None:
                torch.testing.assert_close(torch.tensor(g), w, rtol=1e-3, atol=1e-5)


def test_one_rank_exchanges_nothing():
    net = Net()
    exchange = Exchange(net, 1, lambda: True)
    _loss(net, 0).backward()
    before = [p.grad for p in net.parameters()]
    exchange.finish()
    assert all(p.grad is g for p, g in zip(net.parameters(), before)) and net.unused.grad is None


def test_what_only_deepspeeds_own_exchange_obeys_is_refused():
    raw = {"communication_data_type": "bf16"}
    with pytest.raises(UserError, match="communication_data_type.*engine.overlap"):
        deepspeed_config(Engine(deepspeed=raw), 1, 1, 0.0, 10)
    assert (
        deepspeed_config(Engine(deepspeed=raw, overlap=False), 1, 1, 0.0, 10)[
            "communication_data_type"
        ]
        == "bf16"
    )
    assert (
        deepspeed_config(Engine(deepspeed=raw, stage=1), 1, 1, 0.0, 10)["communication_data_type"]
        == "bf16"
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_is_told_to_overlap(stage):
    zero = lambda overlap: deepspeed_config(
        Engine(stage=stage, bucket_mb=2), 1, 1, 0.0, 10**8, overlap
    )["zero_optimization"]
    assert zero(True)["overlap_comm"] and zero(True)["reduce_bucket_size"] == 2**19
    assert "overlap_comm" not in zero(False) and zero(False)["reduce_bucket_size"] == 10**8
