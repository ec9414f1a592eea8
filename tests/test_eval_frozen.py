"""The frozen backbone: a batch that is left over goes through the graph of the others."""

import pytest
import torch
from torch import nn

from fastdisco.evals.frozen import encoder


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


def test_what_is_left_over_runs_in_the_first_batchs_graph():
    net, replayed = backbone(), []

    def capture(forward, views, kept, dtype):
        def replay(views):
            replayed.append(tuple(views[0].shape))
            return forward(views)

        return replay

    run = encoder(net, "fp32", torch.device("cpu"), capture=capture)
    x = torch.randn(13, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    got = torch.cat([run(part) for part in x.split(5)])
    torch.testing.assert_close(got, net(x))
    assert replayed == [(5, 3, 8, 8)] * 3 and not got.requires_grad


def test_in_half_precision_the_features_are_float32():
    net, x = backbone(), torch.randn(4, 3, 8, 8)
    got = encoder(net, "bf16", torch.device("cpu"))(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, net(x), atol=0.02, rtol=0)
    assert (got - net(x)).abs().max() > 0


@pytest.mark.gpu
def test_the_graph_computes_what_the_network_does():
    net = backbone().cuda()
    x = torch.randn(13, 3, 8, 8, device="cuda")
    run = encoder(net, "fp32", torch.device("cuda"))
    for _ in range(2):
        got = torch.cat([run(part) for part in x.split(5)])
        torch.testing.assert_close(got, net(x), atol=1e-3, rtol=0)
