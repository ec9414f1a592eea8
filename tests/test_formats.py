"""SwAV's and DINO's checkpoints: built here by the published names and shapes, against plain
forwards written from the papers; and refusals."""

import argparse
import math
import os
import shutil
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision

from fastdisco import models, teacher
from fastdisco.config import UserError
from fastdisco.teacher import formats


@pytest.fixture
def tmp_path(tmp_path):
    """Emptied after each test: a checkpoint has up to 500 MB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


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


# ---- whole files of each family


@pytest.mark.parametrize(
    "times, hidden, arch, millions", [(1, 2048, "resnet50", 23.5), (2, 8192, "resnet50w2", 93.9)]
)
def test_swavs_networks_of_full_size(tmp_path, times, hidden, arch, millions):
    torch.manual_seed(0)
    found = swav(times, hidden)
    file = save(tmp_path, found)
    source = formats.read(file)
    assert (source.arch, source.dim, source.head.split(": ")[1]) == (
        arch,
        128,
        f"{2048 * times} -> {hidden} -> 128",
    )
    assert source.ignored == {"prototypes": ["prototypes.weight"]}
    assert sum(p.numel() for p in source.net.backbone.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.1
    )
    p, x = Plain({k.removeprefix("module."): v for k, v in found.items()}), image()
    with torch.no_grad():
        want = p.resnet(x)
        net = source.net.eval()
        agree(net.features(x), want)
        want = p.linear(
            F.relu(p.bn(p.linear(want, "projection_head.0"), "projection_head.1")),
            "projection_head.3",
        )
        agree(net([x]).z[0], want)
    del found, p, source, net
    if times == 1:
        assert (
            teacher.load(file, None, {}, 128).fingerprint
            == teacher.load(file, "resnet50", {}, 128).fingerprint
        )


@pytest.mark.parametrize(
    "arch, module", [("vit_small_patch16_224", ""), ("xcit_small_12_p16_224", "module.")]
)
def test_dinos_networks_of_full_size(tmp_path, arch, module):
    torch.manual_seed(0)
    backbone = vit_small() if arch.startswith("vit") else xcit_small()
    head = dino_head({}, 384)
    source = formats.read(save(tmp_path, dino(backbone, head, module)))
    assert (source.arch, source.dim, source.head.split(": ")[1]) == (
        arch,
        256,
        "384 -> 2048 -> 2048 -> 256",
    )
    assert source.ignored["prototypes of the last layer"] == [
        "head.last_layer.weight_g",
        "head.last_layer.weight_v",
    ]
    assert len(source.ignored["student of its training"]) == 5
    p, x = Plain(backbone), image(224)
    with torch.no_grad():
        want = p.vit(x) if arch.startswith("vit") else p.xcit(x)
        agree(source.net.eval().features(x), want)
        p = Plain(head)
        for at in (0, 2, 4):
            want = p.linear(want if at == 0 else F.gelu(want), f"head.mlp.{at}")
        agree(source.net([x]).z[0], want)


def test_dinos_resnet_with_batch_norm_in_the_head(tmp_path):
    torch.manual_seed(0)
    backbone, head = small_resnet(), dino_head({}, 512, hidden=24, bn=True)
    source = formats.read(save(tmp_path, dino(backbone.state_dict(), head, "module.")))
    assert (source.arch, source.dim) == ("resnet18", 256) and "batch norm and GELU" in source.head
    p, x = Plain(head), image()
    with torch.no_grad():
        want = backbone(x)
        for linear_at, bn_at in ((0, 1), (3, 4)):
            want = F.gelu(p.bn(p.linear(want, f"head.mlp.{linear_at}"), f"head.mlp.{bn_at}"))
        agree(source.net.eval()([x]).z[0], p.linear(want, "head.mlp.6"))


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


@pytest.mark.parametrize(
    "bn, prefix, wrap, prototypes",
    [
        (True, "module.", False, {"prototypes.weight": torch.ones(3, 16)}),
        # DeepCluster-v2.
        (
            True,
            "module.",
            False,
            {f"prototypes.prototypes{i}.weight": torch.ones(3, 16) for i in range(3)},
        ),
        (True, "module.", True, {"prototypes.weight": torch.ones(3, 16)}),  # as main_swav.py saves
        (True, "", False, {}),
        (False, "module.", False, {}),  # RN50w5
    ],
)
def test_swavs_family_in_its_forms(tmp_path, bn, prefix, wrap, prototypes):
    state, net, p = small_swav(bn, prefix, **prototypes)
    source = formats.read(
        save(
            tmp_path,
            {"state_dict": state, "optimizer": {"state": {}}, "epoch": 9} if wrap else state,
        )
    )
    assert source.arch == "resnet18" and sorted(source.ignored.get("prototypes", [])) == sorted(
        prototypes
    )
    x = image()
    with torch.no_grad():
        y = p.linear(net(x), "projection_head.0")
        agree(
            source.net.eval()([x]).z[0],
            p.linear(
                F.relu(p.bn(y, "projection_head.1") if bn else y),
                f"projection_head.{3 if bn else 2}",
            ),
        )


def test_every_known_architecture_is_told_by_its_own_shapes():
    """Names and shapes differ between all of them, so that the first match is the right one."""
    seen = {}
    for arch in formats.ARCHS:
        names = tuple(sorted(models.shapes(arch).items()))
        assert names not in seen, (arch, seen[names])
        seen[names] = arch


@pytest.mark.parametrize(
    "arch, stem, out",
    [("resnet50w2", 128, 4096), ("resnet50w4", 256, 8192), ("resnet50w5", 320, 10240)],
)
def test_the_widened_resnets_have_the_published_shapes(arch, stem, out):
    want = {k: tuple(v.shape) for k, v in resnet50(2).items()} if arch == "resnet50w2" else {}
    got = models.shapes(arch)
    assert (
        got["conv1.weight"] == (stem, 3, 7, 7)
        and got["layer4.2.bn3.weight"] == (out,)
        and got["layer1.0.downsample.0.weight"][1] == stem
    )
    assert not want or got == want


def test_a_widened_resnet_is_a_student_as_well():
    net = models.create("resnet50w2", lambda features: torch.nn.Linear(features, 8))
    assert net.head.in_features == 4096
    net([image(32)]).z.sum().backward()
    assert net.backbone.conv1.weight.grad.abs().max() > 0


# ---- refusals


def test_a_backbone_without_head_is_refused_with_what_to_take(tmp_path):
    torch.manual_seed(0)
    refused(
        save(tmp_path, vit_small()),
        "holds vit_small_patch16_224 alone",
        "dino_deitsmall16_pretrain_full_checkpoint.pth",
    )
    refused(
        save(tmp_path, xcit_small()),
        "holds xcit_small_12_p16_224 alone",
        "dino_xcit_small_12_p16_pretrain_full_checkpoint.pth",
    )
    # Supervised, as torchvision's and timm's.
    classifier = {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}
    refused(
        save(tmp_path, small_resnet().state_dict() | classifier),
        "holds resnet18 alone",
        "without the projection head",
    )
    refused(save(tmp_path, {"model": small_resnet().state_dict()}), "holds resnet18 alone")
    safetensors.torch.save_file(small_resnet().state_dict(), tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "holds resnet18 alone")


def test_missing_heads_are_named(tmp_path):
    state = small_swav()[0]
    head = "module.projection_head."
    refused(
        save(tmp_path, {k: v for k, v in state.items() if not k.startswith(head)}),
        "holds resnet18 alone",
    )
    refused(
        save(tmp_path, {k: v for k, v in state.items() if not k.startswith(head + "3")}),
        "missing: head.3.weight, head.3.bias",
    )
    refused(
        save(tmp_path, {k: v for k, v in state.items() if not k.startswith(head + "1.running")}),
        "missing: head.1.running_mean",
    )
    found = dino(small_resnet().state_dict(), dino_head({}, 512, 24))
    found["teacher"] = {k: v for k, v in found["teacher"].items() if "mlp" not in k}
    refused(save(tmp_path, found), "no projection head (no head.mlp.*")


def test_wrong_prefixes_and_strangers_are_named(tmp_path):
    state = small_swav(prefix="")[0]
    refused(
        save(tmp_path, {f"net.{k}": v for k, v in state.items()}),
        "holds net.conv1.weight",
        "no known format",
        "SwAV",
        "DINO",
        "MoCo",
    )
    refused(
        save(tmp_path, state | {"layer9.weight": torch.ones(1)}),
        "unexpected: backbone.layer9.weight",
        "architecture known here is resnet18",
    )
    found = dino(
        {f"x.{k}": v for k, v in small_resnet().state_dict().items()}, dino_head({}, 512, 24)
    )
    refused(save(tmp_path, found), "of no architecture known here", "set teacher.arch")
    del found["teacher"]
    refused(save(tmp_path, found), "holds student, optimizer", "no known format")


def test_an_arch_that_contradicts_the_file_is_named_with_the_files(tmp_path):
    file = save(tmp_path, small_swav()[0])
    refused(
        file,
        "teacher.arch is resnet34 with {}, but the weights are those of resnet18",
        arch="resnet34",
    )
    refused(
        file,
        "those of resnet18: set teacher.arch=resnet18 and no teacher.kwargs",
        arch="resnet18",
        kwargs={"stem_type": "deep"},
    )
    with pytest.raises(UserError, match="name it as teacher.arch"):
        formats.read(file, None, {"stem_type": "deep"})
    with pytest.raises(UserError, match="embeds into 16 numbers and the student into 128"):
        teacher.load(file, None, {}, 128)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path, share):
    for suffix, write in ((".pth", torch.save), (".safetensors", safetensors.torch.save_file)):
        file = tmp_path / f"file{suffix}"
        write({k: v.clone() for k, v in small_swav()[0].items()}, file)
        os.truncate(file, int(share * file.stat().st_size))
        refused(file, "cut short")


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_flipped_bit_is_refused(tmp_path):
    """Which torch reads without a word where it maps the file."""
    file = save(tmp_path, swav(1, 256))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(file, "damaged")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.fill_(math.nan),
        lambda x: x.fill_(math.inf),
        lambda x: x.to(torch.complex64),
        lambda x: x.to(torch.int32),
        lambda x: x.to_sparse(),
        lambda x: torch.empty_like(x, device="meta"),
    ],
    ids=["nan", "inf", "complex", "int", "sparse", "meta"],
)
def test_weights_that_are_no_finite_numbers_are_named(spoil, tmp_path):
    state = swav(1, 256)
    state["module.layer1.0.conv1.weight"] = spoil(state["module.layer1.0.conv1.weight"])
    refused(save(tmp_path, state), "not finite real numbers: backbone.layer1.0.conv1.weight;")


def test_an_evil_command_line_in_dinos_args_is_refused_and_not_run(tmp_path):
    found = dino(small_resnet().state_dict(), dino_head({}, 512, 24))
    found["args"].output_dir = Evil(tmp_path / "mark")
    file = save(tmp_path, found)
    refused(file, "asks for posix.system", "throw-away container", "'teacher'")
    assert not (tmp_path / "mark").exists()
    torch.load(file, weights_only=False)  # the test's file does run code where it is allowed to
    assert (tmp_path / "mark").exists()


def test_of_a_dino_run_the_mean_student_teaches_and_of_others_the_student(tmp_path, monkeypatch):
    made = {
        which: models.Net(torch.nn.Identity(), torch.nn.Linear(4, 3))
        for which in ("student", "ema")
    }
    for method, which in (("dino", "ema"), ("moco", "student"), ("swav", "student")):
        cfg = types.SimpleNamespace(
            method=types.SimpleNamespace(name=method),
            student=types.SimpleNamespace(arch="resnet18", kwargs={}, dim=3),
        )
        monkeypatch.setattr(
            models,
            "from_run",
            lambda folder, net="student", student=None, cfg=cfg: (made[net], cfg),
        )
        found = formats.read(tmp_path)
        assert (
            found.net is made[which]
            and (found.arch, found.head, found.dim) == ("resnet18", "4 -> 3", 3)
            and method in found.format
        )
