"""What the machine would allow: operations and memory traffic of the networks, and what this device
does of each in a second."""

import copy
from collections.abc import Callable

import torch
from harness import now, seconds
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdisco import models
from step.ours import Ours


def work(ours: Ours, net: models.Net, device: torch.device, n: int) -> dict:
    """Floating-point operations and elements moved for an image's two views, counted on n images,
    and the device's bandwidth.

    net  the teacher as published: its batch norms are not folded away"""
    views = [torch.zeros(n, 3, c.size, c.size, device=device) for c in ours.loader.crops]
    twin = copy.deepcopy(ours.twin)
    with FlopCounterMode(display=False) as count, torch.no_grad():
        teacher_traffic = moved(net, lambda: net(views)) / n
    teacher_flops = count.get_total_flops() / n
    with FlopCounterMode(display=False) as count, torch.no_grad():
        student_traffic = moved(twin, lambda: twin(views)) / n
    # A backward computes, reads and writes twice what a forward does.  torch counts the backward
    # of grouped convolutions wrongly, so only the forward is counted.
    student_flops = 3 * count.get_total_flops() / n
    return dict(
        flops=dict(teacher=teacher_flops, student=student_flops),
        traffic=dict(teacher=teacher_traffic, student=3 * student_traffic),
        bandwidth=bandwidth(device),
        matmul_flops=2 * side(device) ** 3,
    )


def moved(net: nn.Module, forward: Callable) -> float:
    """Elements that convolutions and linear layers read and write in a forward: what remains when
    everything else is fused into them."""
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, x, y: seen.append(x[0].numel() + y.numel()))
        for m in net.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    forward()
    for h in hooks:
        h.remove()
    return float(sum(seen))


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes, the best of five."""
    x = torch.zeros(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    times = [seconds(lambda: y.copy_(x), 1, lambda: now(device)) for _ in range(6)]
    # The first copy touches fresh memory.
    return 2 * len(x) / min(times[1:])


def side(device: torch.device) -> int:
    """Of the square matrices whose product tells the peak."""
    return 8192 if device.type == "cuda" else 1024


def matmul(device: torch.device) -> Callable:
    """The product whose rate counts as the matrix peak: in bf16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(side(device), side(device), device=device, dtype=dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out)
