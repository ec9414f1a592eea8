"""Files as the published teachers are, their weights by names and shapes drawn at random, and plain
forwards of them written from the papers."""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision


def save(tmp_path, found):
    torch.save(found, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def image(size=64, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(5))


# ---- weights by names and shapes


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


# ---- plain forwards


class Plain:
    """Layers by the names of their weights, in eval mode."""

    def __init__(self, state):
        self.state = state

    def get(self, name):
        return self.state.get(name)

    def linear(self, x, name):
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def conv(self, x, name, stride=1, padding=0, groups=1):
        return F.conv2d(
            x, self.get(f"{name}.weight"), self.get(f"{name}.bias"), stride, padding, 1, groups
        )

    def bn(self, x, name):
        return F.batch_norm(
            x, *(self.get(f"{name}.{k}") for k in ("running_mean", "running_var", "weight", "bias"))
        )

    def ln(self, x, name):
        w = self.get(f"{name}.weight")
        return F.layer_norm(x, w.shape, w, self.get(f"{name}.bias"), 1e-6)

    def mlp(self, x, name):
        return self.linear(F.gelu(self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def resnet(self, x):
        x = self.conv(F.pad(x, (1, 1, 1, 1)), "conv1", 2, 2)  # as SwAV's code writes padding 3
        x = F.max_pool2d(F.relu(self.bn(x, "bn1")), 3, 2, 1)
        for layer in range(1, 5):
            for b in range((3, 4, 6, 3)[layer - 1]):
                n, stride = f"layer{layer}.{b}", 2 if b == 0 and layer > 1 else 1
                y = F.relu(self.bn(self.conv(x, f"{n}.conv1"), f"{n}.bn1"))
                y = F.relu(self.bn(self.conv(y, f"{n}.conv2", stride, 1), f"{n}.bn2"))
                y = self.bn(self.conv(y, f"{n}.conv3"), f"{n}.bn3")
                x = F.relu(
                    y
                    + (
                        self.bn(self.conv(x, f"{n}.downsample.0", stride), f"{n}.downsample.1")
                        if b == 0
                        else x
                    )
                )
        return x.mean((2, 3))

    def qkv(self, x, name, heads):
        """[B,N,C] -> three [B,h,N,C/h]"""
        b, n, c = x.shape
        return self.linear(x, f"{name}.qkv").view(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)

    def vit(self, x, heads=6):
        x = self.conv(x, "patch_embed.proj", 16).flatten(2).transpose(1, 2)
        x = torch.cat([self.get("cls_token").expand(len(x), -1, -1), x], 1) + self.get("pos_embed")
        for i in range(12):
            n = f"blocks.{i}"
            q, k, v = self.qkv(self.ln(x, f"{n}.norm1"), f"{n}.attn", heads)
            y = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + self.linear(y.transpose(1, 2).flatten(2), f"{n}.attn.proj")
            x = x + self.mlp(self.ln(x, f"{n}.norm2"), f"{n}.mlp")
        return self.ln(x, "norm")[:, 0]

    def xcit(self, x, heads=8):
        """arXiv:2106.09681: cross-covariance attention, local patch interaction, two blocks of
        class attention."""
        for i in range(4):
            x = self.bn(
                self.conv(x if i == 0 else F.gelu(x), f"patch_embed.proj.{2 * i}.0", 2, 1),
                f"patch_embed.proj.{2 * i}.1",
            )
        h, w = x.shape[-2:]
        x = (
            (x + self.conv(fourier(h, w), "pos_embeder.token_projection"))
            .flatten(2)
            .transpose(1, 2)
        )
        for i in range(12):
            n = f"blocks.{i}"
            # [B,h,C/h,N]
            q, k, v = self.qkv(self.ln(x, f"{n}.norm1"), f"{n}.attn", heads).transpose(-2, -1)
            y = (
                F.normalize(q, dim=-1)
                @ F.normalize(k, dim=-1).transpose(-2, -1)
                * self.get(f"{n}.attn.temperature")
            ).softmax(-1) @ v
            x = x + self.get(f"{n}.gamma1") * self.linear(
                y.flatten(1, 2).transpose(1, 2), f"{n}.attn.proj"
            )
            y = self.ln(x, f"{n}.norm3").transpose(1, 2).unflatten(2, (h, w))
            y = self.bn(
                F.gelu(self.conv(y, f"{n}.local_mp.conv1", 1, 1, y.shape[1])), f"{n}.local_mp.bn"
            )
            y = self.conv(y, f"{n}.local_mp.conv2", 1, 1, y.shape[1])
            x = x + self.get(f"{n}.gamma3") * y.flatten(2).transpose(1, 2)
            x = x + self.get(f"{n}.gamma2") * self.mlp(self.ln(x, f"{n}.norm2"), f"{n}.mlp")
        x = torch.cat([self.get("cls_token").expand(len(x), -1, -1), x], 1)
        for i in range(2):
            n = f"cls_attn_blocks.{i}"
            u = self.ln(x, f"{n}.norm1")
            q, k, v = self.qkv(u, f"{n}.attn", heads)
            # The class token asks.
            y = ((q[:, :, :1] * k).sum(-1) / q.shape[-1] ** 0.5).softmax(-1)[:, :, None] @ v
            y = self.linear(y.transpose(1, 2).flatten(2), f"{n}.attn.proj")
            x = self.ln(x + self.get(f"{n}.gamma1") * torch.cat([y, u[:, 1:]], 1), f"{n}.norm2")
            x = x + torch.cat(
                [self.get(f"{n}.gamma2") * self.mlp(x[:, :1], f"{n}.mlp"), x[:, 1:]], 1
            )
        return self.ln(x, "norm")[:, 0]


def fourier(h, w):
    """[1,64,h,w]: sines and cosines of 32 frequencies of y, then of x, each running from 0 to 2
    pi."""
    freq = 10000 ** (2 * torch.div(torch.arange(32), 2, rounding_mode="floor") / 32)
    y, x = (torch.arange(1, n + 1) / (n + 1e-6) * 2 * math.pi for n in (h, w))
    wave = lambda t: torch.stack(
        [(t[:, None] / freq)[:, 0::2].sin(), (t[:, None] / freq)[:, 1::2].cos()], 2
    ).flatten(1)
    return torch.cat(
        [wave(y)[:, None].expand(h, w, 32), wave(x)[None].expand(h, w, 32)], 2
    ).permute(2, 0, 1)[None]


# ---- small ones


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
