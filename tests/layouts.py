"""Checkpoints as published trainings save them, built by their names and shapes."""

import argparse
from pathlib import Path

import pytest
import torch
import torchvision
from plain_forwards import Plain

from fastdisco.config import UserError
from fastdisco.teacher import formats


def save(tmp_path, found):
    torch.save(found, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def image(size=64, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(5))


def agree(got, want, rtol=1e-3):
    assert want.std(0).mean() > 0.01 * want.abs().mean()  # the images differ
    assert (got - want).norm() < rtol * want.norm(), float((got - want).norm() / want.norm())


def refused(file, *says, **kwargs):
    with pytest.raises(UserError) as e:
        formats.read(file, **kwargs)
    assert all(s in str(e.value) for s in (str(file), *says)) and "\n" not in str(e.value), str(
        e.value
    )


def linear(state, name, out, width):
    state[f"{name}.weight"] = torch.randn(out, width) / width**0.5
    state[f"{name}.bias"] = 0.1 * torch.randn(out)


def conv(state, name, out, width, k, bias=False):
    state[f"{name}.weight"] = torch.randn(out, width, k, k) / (width * k * k / 2) ** 0.5
    if bias:
        state[f"{name}.bias"] = 0.1 * torch.randn(out)


def norm(state, name, width, batch=True):
    state[f"{name}.weight"], state[f"{name}.bias"] = (
        torch.rand(width) + 0.5,
        0.1 * torch.randn(width),
    )
    if batch:
        state |= {
            f"{name}.running_mean": 0.1 * torch.randn(width),
            f"{name}.running_var": torch.rand(width) + 0.5,
            f"{name}.num_batches_tracked": torch.tensor(99),
        }


def resnet50(times=1, depth=(3, 4, 6, 3)):
    """torchvision's names; every width multiplied; of any depth."""
    state, width = {}, 64 * times
    conv(state, "conv1", width, 3, 7)
    norm(state, "bn1", width)
    for layer, blocks in enumerate(depth):
        inner = 64 * times * 2**layer
        for b in range(blocks):
            name = f"layer{layer + 1}.{b}"
            for i, (out, into, k) in enumerate(
                ((inner, width, 1), (inner, inner, 3), (4 * inner, inner, 1)), 1
            ):
                conv(state, f"{name}.conv{i}", out, into, k)
                norm(state, f"{name}.bn{i}", out)
            state[f"{name}.bn3.weight"] *= 0.3  # the sum over blocks stays small
            if b == 0:
                conv(state, f"{name}.downsample.0", 4 * inner, width, 1)
                norm(state, f"{name}.downsample.1", 4 * inner)
            width = 4 * inner
    return state


def swav(times, hidden, bn=True, prefix="module.", prototypes=("prototypes.weight",)):
    state = resnet50(times)
    linear(state, "projection_head.0", hidden, 2048 * times)
    if bn:
        norm(state, "projection_head.1", hidden)
    linear(state, f"projection_head.{3 if bn else 2}", 128, hidden)
    state |= {name: torch.randn(300, 128) for name in prototypes}
    return {prefix + k: v for k, v in state.items()}


def dino_head(state, width, hidden=2048, bn=False, outputs=500):
    places = (0, 3, 6) if bn else (0, 2, 4)
    for at, (out, into) in zip(places, ((hidden, width), (hidden, hidden), (256, hidden))):
        linear(state, f"head.mlp.{at}", out, into)
    if bn:
        norm(state, "head.mlp.1", hidden)
        norm(state, "head.mlp.4", hidden)
    state |= {
        "head.last_layer.weight_g": torch.ones(outputs, 1),
        "head.last_layer.weight_v": torch.randn(outputs, 256),
    }
    return state


def block(state, name, dim):
    for n in ("norm1", "norm2"):
        norm(state, f"{name}.{n}", dim, batch=False)
    linear(state, f"{name}.attn.qkv", 3 * dim, dim)
    linear(state, f"{name}.attn.proj", dim, dim)
    linear(state, f"{name}.mlp.fc1", 4 * dim, dim)
    linear(state, f"{name}.mlp.fc2", dim, 4 * dim)


def vit_small(dim=384):
    state = {"cls_token": torch.randn(1, 1, dim), "pos_embed": torch.randn(1, 197, dim)}
    conv(state, "patch_embed.proj", dim, 3, 16, bias=True)
    for i in range(12):
        block(state, f"blocks.{i}", dim)
    norm(state, "norm", dim, batch=False)
    return state


def xcit_small(dim=384, heads=8):
    """Upstream's names: pos_embeder, and one qkv in class attention."""
    state = {"cls_token": torch.randn(1, 1, dim)}
    widths = [3, dim // 8, dim // 4, dim // 2, dim]
    for i in range(4):
        conv(state, f"patch_embed.proj.{2 * i}.0", widths[i + 1], widths[i], 3)
        norm(state, f"patch_embed.proj.{2 * i}.1", widths[i + 1])
    conv(state, "pos_embeder.token_projection", dim, 64, 1, bias=True)
    for i in range(12):
        name = f"blocks.{i}"
        block(state, name, dim)
        norm(state, f"{name}.norm3", dim, batch=False)
        state[f"{name}.attn.temperature"] = torch.rand(heads, 1, 1) + 0.5
        for c in (1, 2):
            conv(state, f"{name}.local_mp.conv{c}", dim, 1, 3, bias=True)
        norm(state, f"{name}.local_mp.bn", dim)
        state |= {f"{name}.gamma{g}": torch.rand(dim) for g in (1, 2, 3)}
    for i in range(2):
        block(state, f"cls_attn_blocks.{i}", dim)
        state |= {f"cls_attn_blocks.{i}.gamma{g}": torch.rand(dim) for g in (1, 2)}
    norm(state, "norm", dim, batch=False)
    return state


def dino(backbone, head, module=""):
    """A full checkpoint: the networks, the optimizer's and the command line's rest, as main_dino.py
    saves them."""
    net = {f"backbone.{k}": v for k, v in backbone.items()} | head
    args = argparse.Namespace(
        arch="vit_small",
        lr=5e-4,
        output_dir=Path("/checkpoint/dino"),
        local_crops_scale=(0.05, 0.4),
    )
    return {
        "student": {
            f"module.{k}": v + 1 if v.is_floating_point() else v for k, v in list(net.items())[:5]
        },
        "teacher": {module + k: v for k, v in net.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-6}]},
        "epoch": 800,
        "args": args,
        "dino_loss": {"center": torch.zeros(1, 500)},
        "fp16_scaler": {"scale": 65536.0},
    }


def small_resnet():
    """torchvision's ResNet-18 without classifier, with statistics as after training: SwAV's layout
    at small size."""
    net = torchvision.models.resnet18()
    net.fc = torch.nn.Identity()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    return net.eval()


def small_swav(bn=True, prefix="module.", **more):
    torch.manual_seed(0)
    net, head = small_resnet(), {}
    linear(head, "projection_head.0", 24, 512)
    if bn:
        norm(head, "projection_head.1", 24)
    linear(head, f"projection_head.{3 if bn else 2}", 16, 24)
    return {prefix + k: v for k, v in (net.state_dict() | head | more).items()}, net, Plain(head)
