"""Where float32 products on a GPU are in TF32: in forward and backward of the networks, and nowhere
else.  The switches can be watched without a GPU."""

import pytest
import torch
from torch import nn

from fastdisco import kernels, models
from fastdisco.models import heads


class Watched(torch.autograd.Function):
    """Notes the switch when it runs forward and when it runs backward."""

    @staticmethod
    def forward(ctx, x, name, seen):
        ctx.name, ctx.seen = name, seen
        seen[f"{name} forward"] = torch.backends.cuda.matmul.allow_tf32
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen[f"{ctx.name} backward"] = torch.backends.cuda.matmul.allow_tf32
        return grad, None, None


class Layer(nn.Linear):
    def forward(self, x):
        return Watched.apply(super().forward(x), self.name, self.seen)


@pytest.fixture(params=[True, False], ids=["tf32", "no tf32"])
def tf32(request, monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param)
    matmul.allow_tf32 = False
    yield request.param
    matmul.allow_tf32 = before


@pytest.mark.parametrize("joint", [True, False])
def test_products_are_tf32_within_networks_alone(tf32, joint):
    torch.manual_seed(0)
    seen = {}
    parts = {"backbone": Layer(12, 8), "head": Layer(8, 4)}
    for name, layer in parts.items():
        layer.name, layer.seen = name, seen
    net = models.Net(
        nn.Sequential(nn.Flatten(), parts["backbone"]),
        parts["head"],
        heads.Prototypes(4, 5),
        joint=joint,
    )
    views = [torch.randn(6, 3, 2, 2) for _ in range(2)]
    z, scores = net(views)
    seen["between forward"] = torch.backends.cuda.matmul.allow_tf32
    # Of the relational loss both forward and backward have products.
    distance, angle = kernels.rkd(Watched.apply(z[0], "loss on z", seen), torch.randn(6, 4))
    targets = torch.softmax(torch.randn(2, 6, 5), 2)
    swapped = kernels.swapped(Watched.apply(scores, "loss on scores", seen), targets, 0.1)
    total = Watched.apply(swapped + distance + angle, "total", seen)
    total.backward()
    inside = {f"{part} {way}" for part in parts for way in ("forward", "backward")}
    outside = {
        f"{loss} {way}"
        for loss in ("loss on z", "loss on scores", "total")
        for way in ("forward", "backward")
    }
    assert seen == dict.fromkeys(inside, tf32) | dict.fromkeys(outside | {"between forward"}, False)
    assert not torch.backends.cuda.matmul.allow_tf32
    # A second backward, and one that autograd.grad asks for.
    grads = torch.autograd.grad(net(views).z.sum(), list(parts["head"].parameters()))
    assert len(grads) == 2 and not torch.backends.cuda.matmul.allow_tf32


def test_an_error_in_a_network_leaves_the_switch_off(tf32):
    net = models.Net(nn.Flatten(), nn.Linear(5, 2))
    with pytest.raises(RuntimeError):
        net([torch.randn(2, 3, 2, 2)])
    assert not torch.backends.cuda.matmul.allow_tf32
