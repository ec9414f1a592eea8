"""The forwards of published networks, written out from the papers, with the weights' published names."""

import math

import torch
import torch.nn.functional as F


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
