"""Networks: heads and feature widths, per-view and per-group batch norm against float64 formulas,
the mean student, refusals."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from torch import nn

from fastdisco import config, models
from fastdisco.common import dist
from fastdisco.common.console import shorten
from fastdisco.config import UserError
from fastdisco.models import batchnorm, heads
from fastdisco.models.syncbn import SYNCED

STUDENTS = {
    "mobilenetv3_large_100": 1280,
    "efficientnet_b0": 1280,
    "efficientnet_b1": 1280,
    "resnet18": 512,
    "resnet34": 512,
    # The paper's, and the published widths of their features.
    "vit_tiny_patch16_224": 192,
    "xcit_tiny_12_p16_224": 192,
}
WIDTHS = STUDENTS | {"mobilenetv3_small_050": 1024, "resnet50": 2048, "resnet50w2": 4096}


def small(groups=1, seed=0, arch="resnet10t"):
    torch.manual_seed(seed)
    net = models.create(arch, lambda dim: heads.mlp(dim, 32, 8))
    models.split_bn(net, groups)
    return net


def images(b, seed=1, size=32):
    x = torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("arch", WIDTHS)
def test_feature_width(arch):
    asked = []
    net = models.create(arch, lambda dim: asked.append(dim) or heads.mlp(dim, 4, 8)).eval()
    x, w = images(1, size=224 if "vit" in arch else 64), net.head.state_dict()
    with torch.no_grad():
        found, z = net.features(x), net([x]).z
    assert asked == [WIDTHS[arch]] and found.shape == (1, WIDTHS[arch])
    hidden = (found @ w["0.weight"].T + w["0.bias"]).clamp(min=0)
    torch.testing.assert_close(z[0], hidden @ w["2.weight"].T + w["2.bias"])


@pytest.mark.parametrize("arch", STUDENTS)
def test_gradients_reach_every_weight_of_a_student(arch):
    # Timm's own start lets nothing through the blocks in the first step.
    kwargs = {"zero_init_last": False} if "resnet" in arch else {}
    net = models.create(arch, lambda dim: heads.mlp(dim, 32, 8), kwargs)
    net([images(2, size=224 if "vit" in arch else 64)]).z.square().sum().backward()
    assert [
        k
        for k, p in net.named_parameters()
        if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()
    ] == []


def test_the_head_is_linear_relu_linear_and_hidden_0_is_one_linear():
    torch.manual_seed(0)
    head, x = heads.mlp(5, 7, 3), torch.randn(4, 5)
    w = head.state_dict()
    assert list(w) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    want = (x @ w["0.weight"].T + w["0.bias"]).clamp(min=0) @ w["2.weight"].T + w["2.bias"]
    torch.testing.assert_close(head(x.clone()), want)
    assert {k: tuple(v.shape) for k, v in heads.mlp(5, 0, 3).state_dict().items()} == {
        "weight": (3, 5),
        "bias": (3,),
    }


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    a, b, c = (small(seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in ("backbone.conv1.0.weight", "head.0.weight"))


def test_new_weights_are_contiguous():
    # DeepSpeed broadcasts them as bytes; the loop then turns them.
    assert all(p.is_contiguous() for p in small(2).parameters())


def test_training_runs_one_forward_per_view_with_statistics_of_that_view():
    net = small()
    plain = copy.deepcopy(net)
    a, b = images(8), 3 * images(8, seed=2) + 1
    z = net([a, b]).z
    # One after the other, each with its own statistics.
    want = torch.stack([plain.head(plain.backbone(v)) for v in (a, b)])
    torch.testing.assert_close(z, want)
    assert all(torch.equal(x, y) for x, y in zip(net.buffers(), plain.buffers()))
    joint = plain.head(plain.backbone(torch.cat([a, b]))).view(2, 8, 8)
    # What it would be with the statistics of both views.
    assert (joint - want).abs().max() > 0.01 * want.abs().max()


def test_eval_runs_one_forward_per_resolution_and_keeps_the_order_of_views():
    net = small().eval()
    calls = []
    net.backbone.register_forward_hook(lambda m, x, y: calls.append(tuple(x[0].shape)))
    views = [images(3, 1), images(3, 2, size=48), images(3, 3)]
    z = net(views).z
    assert calls == [(6, 3, 32, 32), (3, 3, 48, 48)]
    torch.testing.assert_close(z, torch.stack([net.head(net.backbone(v)) for v in views]))


def test_the_head_is_inside_the_forwards_autocast():
    net = small()
    with torch.autocast("cpu", torch.bfloat16):
        z = net([images(4)]).z
    assert z.dtype == torch.bfloat16 and {p.dtype for p in net.parameters()} == {torch.float32}


def by_hand(x, weight, bias, groups, eps, momentum, mean, var):
    """Batch norm per slice as its formulas say, in float64: outputs, and the mean of the slices'
    running statistics."""
    out, means, variances = [], [], []
    axes = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    size = len(x) // groups
    for g in range(groups):
        part = x[g * size : (g + 1) * size]
        mu = part.mean(axes)
        dev = part - mu.view(shape)
        n = part.numel() / part.shape[1]
        out.append(
            dev / (dev.square().mean(axes).view(shape) + eps).sqrt() * weight.view(shape)
            + bias.view(shape)
        )
        means.append((1 - momentum) * mean + momentum * mu)
        # running_var is unbiased.
        variances.append((1 - momentum) * var + momentum * dev.square().sum(axes) / (n - 1))
    return torch.cat(out), sum(means) / groups, sum(variances) / groups


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d])
def test_split_batch_norm_is_batch_norm_of_each_slice(kind, groups, layout):
    gen = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    bn = kind(5, eps=1e-3, momentum=0.3).double()
    if kind is BatchNormAct2d:
        bn.act = nn.SiLU()
    bn.load_state_dict(
        {
            "weight": draw(5),
            "bias": draw(5),
            "running_mean": draw(5),
            "running_var": draw(5).square(),
            "num_batches_tracked": torch.tensor(6),
        }
    )
    x = (
        draw(12, 5)
        if kind is nn.BatchNorm1d
        else draw(12, 5, 4, 3).contiguous(memory_format=layout)
    )
    scale = torch.arange(1.0, 13, dtype=torch.float64).view([-1] + [1] * (x.ndim - 1))
    x = x * scale + scale  # slices of unlike statistics
    keys = list(bn.state_dict())
    w, b, mean, var = (
        bn.state_dict()[k].clone() for k in ("weight", "bias", "running_mean", "running_var")
    )
    xs, up = (
        [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)],
        draw(*x.shape),
    )

    models.split_bn(bn, groups)
    y = bn(xs[0])
    y.backward(up)
    w.requires_grad_(), b.requires_grad_()
    want, new_mean, new_var = by_hand(xs[1], w, b, groups, 1e-3, 0.3, mean, var)
    if kind is BatchNormAct2d:
        want = want * torch.sigmoid(want)
    want.backward(up)

    close = dict(rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(y, want, **close)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, **close)
    torch.testing.assert_close(bn.weight.grad, w.grad, **close)
    torch.testing.assert_close(bn.bias.grad, b.grad, **close)
    torch.testing.assert_close(bn.running_mean, new_mean.detach(), **close)
    torch.testing.assert_close(bn.running_var, new_var.detach(), **close)
    assert list(bn.state_dict()) == keys and bn.num_batches_tracked == 7
    if x.ndim == 4:
        assert y.is_contiguous(memory_format=layout)

    bn.eval()
    shape = [1, -1] + [1] * (x.ndim - 2)
    want = (x - new_mean.view(shape)) / (new_var.view(shape) + 1e-3).sqrt() * w.view(
        shape
    ) + b.view(shape)
    torch.testing.assert_close(
        bn(x), want * torch.sigmoid(want) if kind is BatchNormAct2d else want, **close
    )


@pytest.mark.parametrize("arch", ["resnet10t", "mobilenetv3_small_050"])
def test_groups_equal_separate_forwards_of_the_slices(arch):
    net, plain = small(4, arch=arch).double(), small(1, arch=arch).double()
    assert list(net.state_dict()) == list(plain.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values())
    )
    start, x = copy.deepcopy(plain.state_dict()), images(16).double()
    z = net([x]).z[0]
    parts, stats = [], []
    for part in x.chunk(4):
        plain.load_state_dict(start)
        parts.append(plain([part]).z[0])
        stats.append({k: b.clone() for k, b in plain.named_buffers() if b.is_floating_point()})
    torch.testing.assert_close(z, torch.cat(parts), rtol=1e-9, atol=1e-9)
    mean = {k: torch.stack([s[k] for s in stats]).mean(0) for k in stats[0]}
    torch.testing.assert_close(
        {k: b for k, b in net.named_buffers() if b.is_floating_point()}, mean, rtol=1e-9, atol=1e-9
    )


def test_split_batch_norm_with_the_average_of_all_batches_and_without_statistics():
    bn, x = nn.BatchNorm1d(2, momentum=None).double(), torch.randn(2, 8, 2, dtype=torch.float64)
    models.split_bn(bn, 4)
    bn(x[0]), bn(x[1])  # momentum None: the running statistics are the mean over everything seen
    torch.testing.assert_close(bn.running_mean, x.mean([0, 1]))
    torch.testing.assert_close(bn.running_var, x.view(8, 2, 2).var(1).mean(0))
    bare = nn.BatchNorm1d(2, track_running_stats=False).double()
    models.split_bn(bare, 4)
    want = by_hand(x[0], torch.ones(2), torch.zeros(2), 4, 1e-5, 0.1, 0, 0)[0]
    torch.testing.assert_close(bare(x[0]), want)


def test_split_batch_norm_keeps_fp32_statistics_under_autocast():
    net = small(2)
    with torch.autocast("cpu", torch.bfloat16):
        net([images(8)]).z.float().sum().backward()
    buffers = [b for b in net.buffers() if b.is_floating_point()]
    assert {b.dtype for b in buffers} == {torch.float32} and all(
        b.isfinite().all() for b in buffers
    )
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_one_group_leaves_every_module_as_it_is():
    assert {type(m) for m in small(1).modules()} & set(batchnorm._SPLIT.values()) == set()


def test_a_batch_norm_that_cannot_be_split_is_refused():
    with pytest.raises(
        UserError, match="bn.groups: the BatchNorm3d at 0 cannot be split into 2; set bn.groups=1"
    ):
        models.split_bn(nn.Sequential(nn.BatchNorm3d(2)), 2)
    # Batch statistics without being a batch norm.
    with pytest.raises(UserError, match="the EvoNorm2dB0 at 0 cannot be split"):
        models.split_bn(nn.Sequential(EvoNorm2dB0(2)), 2)
    # Of each image alone.
    models.split_bn(nn.Sequential(nn.GroupNorm(1, 2), nn.InstanceNorm2d(2), nn.LayerNorm(2)), 2)
    with pytest.raises(ValueError, match="batch of 6 does not split into 4"):
        small(4)([images(6)])


def test_the_mean_student_follows_its_formula_and_keeps_its_own_buffers():
    net = small(2)
    ema = models.ema_copy(net)
    assert ema.training and not any(p.requires_grad for p in ema.parameters())
    assert {p.data_ptr() for p in ema.parameters()}.isdisjoint(
        p.data_ptr() for p in net.parameters()
    )
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape))
    net([images(8)])  # moves the student's statistics
    before, buffers = [p.double() for p in ema.parameters()], copy.deepcopy(list(ema.buffers()))
    models.ema_update(ema, net, 0.9)
    for new, old, p in zip(ema.parameters(), before, net.parameters()):
        torch.testing.assert_close(
            new.double(), 0.9 * old + 0.1 * p.detach().double(), rtol=1e-5, atol=1e-6
        )
    assert all(torch.equal(a, b) for a, b in zip(ema.buffers(), buffers))
    assert any(not torch.equal(a, b) for a, b in zip(ema.buffers(), net.buffers()))
    ema([images(8, seed=5)])
    # Its own forward moves its own.
    assert any(not torch.equal(a, b) for a, b in zip(ema.buffers(), buffers))


def test_mean_buffers_are_copies_of_the_floating_ones():
    net = small()
    found = models.mean_buffers(net)
    assert set(found) == {
        k for k in net.state_dict() if k.endswith(("running_mean", "running_var"))
    }
    found["backbone.bn1.running_mean"].add_(1)
    assert net.backbone.bn1.running_mean.abs().max() == 0


def test_an_unknown_arch_is_refused_with_the_nearest_names():
    with pytest.raises(
        UserError, match="has no model 'mobilenetv3_large'; did you mean .*mobilenetv3_large_100"
    ):
        models.create("mobilenetv3_large", nn.Identity)
    with pytest.raises(UserError, match="has no model 'hf_hub:timm/resnet18'"):  # no download
        models.create("hf_hub:timm/resnet18", nn.Identity)


@pytest.mark.parametrize(
    "kwargs, says",
    [
        ({"stem_widht": 32}, "timm cannot make resnet18 with .*stem_widht"),
        ({"pretrained": True}, "random weights"),
        ({"num_classes": 10}, "the head is ours"),
        ({"in_chans": 1}, "3 channels"),
    ],
)
def test_wrong_kwargs_are_refused(kwargs, says):
    with pytest.raises(UserError, match=says):
        models.create("resnet18", nn.Identity, kwargs)


def test_kwargs_reach_timm():
    assert (
        models.create("resnet18", nn.Identity, {"stem_width": 16, "stem_type": "deep"})
        .backbone.conv1[0]
        .weight.shape[0]
        == 16
    )


def test_loading_names_what_is_missing_unexpected_and_of_another_shape():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    w = {"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3), "x": torch.ones(1)}
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError) as e:
        models.load_weights(net, w, "a.pt", "do that")
    assert str(e.value) == (
        "a.pt: missing: 1.weight, 1.bias, 1.running_mean, 1.running_var; unexpected: x; "
        "of another shape: 0.weight (3, 4) for (3, 2); do that"
    )
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert shorten([str(i) for i in range(9)]) == "0, 1, 2, 3 and 5 more"


# ---- several resolutions, heads and prototypes

STUDENTS = [
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "efficientnet_b1",
    "resnet18",
    "resnet34",
    "vit_tiny_patch16_224",
    "xcit_tiny_12_p16_224",
]


@pytest.mark.parametrize("arch", STUDENTS)
def test_every_student_trains_on_two_resolutions_at_once(arch):
    torch.manual_seed(0)
    kwargs = {} if arch.startswith("mobilenet") or "res" in arch else {"drop_path_rate": 0.1}
    net = models.create(arch, lambda dim: heads.dino_mlp(dim, 16, 8), kwargs, sizes=(64, 32))
    net.prototypes, net.joint = heads.Prototypes(8, 5), True
    z, scores = net([images(2, 1, 64), images(2, 2, 32), images(2, 3, 64)])
    assert z.shape == (3, 2, 8) and scores.shape == (3, 2, 5)
    (scores * torch.randn(3, 2, 5)).sum().backward()
    assert not [
        n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "xcit_tiny_12_p16_224"])
def test_positions_are_interpolated_for_small_crops(arch):
    torch.manual_seed(0)
    net = models.create(arch, nn.Identity, sizes=(64, 32)).eval()
    big, little = images(1, 1, 64), images(1, 2, 32)
    with torch.no_grad():
        joint = net([big, little]).z
        assert torch.equal(joint[0], net.backbone(big)) and torch.equal(
            joint[1], net.backbone(little)
        )
        if arch.startswith("vit"):
            # [1,1+16,192]: a class token, and a grid of 4 x 4 for 64 px.
            embed = net.backbone.pos_embed
            assert embed.shape == (1, 17, 192)
            grid = nn.functional.interpolate(
                embed[:, 1:].transpose(1, 2).view(1, 192, 4, 4),
                (2, 2),
                mode="bicubic",
                antialias=True,
            )
            plain = models.create(arch, nn.Identity, {"img_size": 32}).eval()
            plain.load_state_dict(
                net.state_dict()
                | {
                    "backbone.pos_embed": torch.cat(
                        [embed[:, :1], grid.flatten(2).transpose(1, 2)], 1
                    )
                }
            )
            torch.testing.assert_close(plain([little]).z[0], joint[1], rtol=1e-4, atol=1e-4)


def test_a_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(
        UserError, match="student.arch: vit_tiny_patch16_224 cannot take crops of 40 px"
    ):
        models.create("vit_tiny_patch16_224", nn.Identity, sizes=(32, 40))


def test_a_joint_forward_has_the_statistics_of_all_views_of_a_size_and_one_head():
    torch.manual_seed(0)
    net = models.create("resnet10t", lambda dim: heads.mlp(dim, 32, 8, bn=True)).double()
    net.joint = True
    plain = copy.deepcopy(net)
    a, c = images(6).double(), 3 * images(6, 2).double() + 1
    b = images(6, 3, 48).double()
    z = net([a, b, c]).z  # sizes mixed: order must come back
    large = plain.backbone(torch.cat([a, c]))
    want = plain.head(torch.cat([large, plain.backbone(b)])).view(3, 6, 8)[[0, 2, 1]]
    torch.testing.assert_close(z, want)
    assert torch.equal(net.backbone.bn1.running_mean, plain.backbone.bn1.running_mean)
    torch.testing.assert_close(
        net.eval()([a, b, c]).z, torch.stack([plain.eval()([v]).z[0] for v in (a, b, c)])
    )


def test_groups_of_a_joint_forward_are_images_with_all_their_views():
    torch.manual_seed(0)
    whole = models.create("resnet10t", lambda dim: heads.mlp(dim, 32, 8, bn=True)).double()
    whole.joint = True
    halves = copy.deepcopy(whole)
    models.split_bn(whole, 2)
    views = [images(6).double(), images(6, 2).double(), images(6, 3, 48).double()]
    # As two ranks would.
    want = torch.cat([halves([v[part] for v in views]).z for part in (slice(3), slice(3, 6))], 1)
    torch.testing.assert_close(whole(views).z, want)


def test_prototypes_are_cosines_to_rows_of_length_1():
    torch.manual_seed(0)
    layer, z = heads.Prototypes(4, 3), torch.randn(2, 5, 4)
    w, g = layer.weight.detach(), torch.randn(2, 5, 3)
    torch.testing.assert_close(w.norm(dim=1), torch.ones(3))
    want = (unit_z := z / z.norm(dim=2, keepdim=True)) @ w.T
    torch.testing.assert_close(layer(z), want)
    (layer(z) * g).sum().backward()
    # The radial part is in it, as in the published code.
    torch.testing.assert_close(layer.weight.grad, torch.einsum("vbp,vbd->pd", g, unit_z))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(z.bfloat16() * 1e-3).float().sub(want).abs().max() < 0.03
    # Checkpoints once held rows of any length.
    other = heads.Prototypes(4, 3)
    other.load_state_dict({"weight": w * torch.tensor([[0.3], [1.0], [7.0]])})
    torch.testing.assert_close(other.weight.detach(), w)
    # A resume is exact: rows whose length is 1 up to rounding are not touched.
    rounded = w * (1 + 1e-6)
    other.load_state_dict({"weight": rounded})
    assert torch.equal(other.weight.detach(), rounded)


def test_dinos_last_layer_knows_directions_alone():
    torch.manual_seed(0)
    layer, z = heads.LastLayer(4, 3), torch.randn(2, 5, 4)
    w = layer.weight.detach().clone()
    want = (z / z.norm(dim=2, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(layer(z), want)
    layer(z).square().sum().backward()
    # Along the sphere; and nothing edits the rows.
    assert (layer.weight.grad * w).sum(1).abs().max() < 1e-6 and torch.equal(layer.weight, w)
    long = heads.LastLayer(4, 3, gain=True)
    assert long.gain.shape == (3, 1)
    # As [P] in checkpoints of before.
    for gain in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0], [2.0], [3.0]])):
        long.load_state_dict({"weight": w, "gain": gain})
        torch.testing.assert_close(long(z), want * torch.tensor([1.0, 2.0, 3.0]))


def test_dinos_head_is_three_linear_layers_with_gelu():
    torch.manual_seed(0)
    head, x = heads.dino_mlp(5, 7, 3), torch.randn(4, 5)
    w = head.state_dict()
    # The published keys.
    assert list(w) == [f"{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")]
    gelu = lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))
    hidden = gelu(gelu(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"])
    torch.testing.assert_close(head(x), hidden @ w["4.weight"].T + w["4.bias"])
    assert [
        k.split(".")[0] for k in heads.dino_mlp(5, 7, 3, bn=True).state_dict() if k.endswith("bias")
    ] == ["0", "1", "3", "4", "6"]
    big = heads.dino_mlp(64, 512, 64)
    assert big[2].weight.std().item() == pytest.approx(0.02, rel=0.02) and all(
        m.bias.abs().max() == 0 for m in (big[0], big[2], big[4])
    )
    assert heads.dino_mlp(5, 0, 3).weight.shape == (3, 5)


BASE = {"run": {"name": "x"}, "data": {"train": "t"}, "teacher": {"file": "t"}}


@pytest.mark.parametrize(
    "method, head, prototypes, joint",
    [
        ({"name": "moco"}, ["0.weight", "0.bias", "2.weight", "2.bias"], None, False),
        ({"name": "seed"}, ["0.weight", "0.bias", "2.weight", "2.bias"], None, False),
        (
            {"name": "swav"},
            [
                "0.weight",
                "0.bias",
                "1.weight",
                "1.bias",
                "1.running_mean",
                "1.running_var",
                "1.num_batches_tracked",
                "3.weight",
                "3.bias",
            ],
            (3000, 128),
            True,
        ),
        (
            {"name": "dino", "prototypes": 70},
            ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"],
            (70, 256),
            True,
        ),
    ],
    ids=lambda v: v["name"] if isinstance(v, dict) else "",
)
def test_a_configuration_says_the_whole_network(method, head, prototypes, joint):
    net = models.of(
        config.validate(BASE | {"method": method, "student": {"arch": "test_resnet"}}, "test"),
        train=True,
    )
    assert (
        list(net.head.state_dict()) == head
        and net.joint == joint
        and next(net.head.parameters()).shape[0] == 2048
    )
    assert (net.prototypes and tuple(net.prototypes.weight.shape)) == prototypes
    assert getattr(net.prototypes, "gain", None) is None


def test_an_unknown_batch_norm_is_not_synchronised(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    net = nn.Sequential(nn.BatchNorm3d(4))
    with pytest.raises(UserError, match="bn.sync: the BatchNorm3d at 0 .*bn.sync=false"):
        models.sync_bn(net)
    # A ViT has nothing to synchronise.
    plain = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    assert models.sync_bn(plain) is plain


def test_dino_synchronises_batch_norms_as_its_code_does(monkeypatch):
    """XCiT's in its patches and blocks; the copy of the network, the mean student, has them, too."""
    cfg = config.validate(
        BASE | {"method": {"name": "dino"}, "student": {"arch": "xcit_nano_12_p16_224"}}, "test"
    )
    monkeypatch.setattr(dist, "world", lambda: 2)
    net = models.of(cfg, train=True)
    for found in (net, models.ema_copy(net)):
        norms = [m for m in found.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) > 10 and all(type(m) in SYNCED.values() for m in norms)


def test_synchronised_batch_norm_keeps_names_and_activations(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    plain = small(arch="mobilenetv3_small_050")
    keys = list(plain.state_dict())
    net = models.sync_bn(copy.deepcopy(plain))
    assert list(net.state_dict()) == keys
    assert any(
        isinstance(m, SYNCED[nn.BatchNorm2d] | SYNCED[BatchNormAct2d]) for m in net.modules()
    )
    torch.testing.assert_close(net.eval()([images(2)]).z, plain.eval()([images(2)]).z)
