"""SwAV's and DINO's checkpoints against plain forwards written from the papers."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from layouts import (
    agree,
    dino,
    dino_head,
    image,
    resnet50,
    save,
    small_resnet,
    small_swav,
    swav,
    vit_small,
    xcit_small,
)
from plain_forwards import Plain

from fastdisco import models, teacher
from fastdisco.teacher import formats


@pytest.fixture
def tmp_path(tmp_path):
    """Emptied after each test: a checkpoint has up to 500 MB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


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
