"""How the teacher runs, on a CPU: folded batch norm, half precision and batch statistics against
plain forwards of the same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdisco import config, models, teacher
from fastdisco.config import UserError
from fastdisco.models import heads
from fastdisco.teacher import Options, Teacher
from fastdisco.teacher.fold import fold


def drawn(net):
    """Statistics and weights of norms as after training: a fold that forgets one must show."""
    for m in net.modules():
        if isinstance(m, _BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.3, 3)
            if m.affine:
                m.weight.data.uniform_(0.5, 1.5)
                m.bias.data.normal_(0, 0.3)
    return net.eval()


def net(arch="test_resnet", bn=True, **kwargs):
    torch.manual_seed(0)
    return drawn(models.create(arch, lambda d: heads.mlp(d, 24, 16, bn), kwargs))


def views(n=2, b=4, size=32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, 3, size, size, generator=g) for _ in range(n)]


def norms(net):
    return [m for m in net.modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize("arch", ["test_resnet", "test_efficientnet", "resnet18"])
def test_every_norm_after_a_layer_is_folded_and_activations_stay(arch):
    # ResNets activate beside the norm, EfficientNets in it (BatchNormAct2d), the head has a
    # BatchNorm1d.
    plain = net(arch)
    folded, x = copy.deepcopy(plain), views()
    assert fold(folded, views(seed=2)) == len(norms(plain)) and not norms(folded)
    with torch.no_grad():
        torch.testing.assert_close(folded(x).z, plain(x).z, rtol=1e-4, atol=1e-5)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class Awkward(nn.Module):
    """Norms that follow a layer and yet are no part of it, and one that is."""

    head_hidden_size = 4

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, bias=False)
        self.mine = nn.BatchNorm2d(4)
        # Something else reads the layer's output.
        self.read, self.read_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.twice_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)  # called twice
        # The weight is not what multiplies.
        self.standard, self.standard_norm = Standardised(4, 4, 1), nn.BatchNorm2d(4)
        # One weight for two.
        self.shared, self.shared_norm, self.sharer = (
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
        )
        self.sharer.weight = self.shared.weight
        # Normalises positions, not features.
        self.wide, self.wide_norm = nn.Linear(4, 4), nn.BatchNorm1d(9)
        self.alone = nn.BatchNorm2d(4)  # after no layer

    def forward(self, x):
        x = self.mine(self.first(x)).relu()
        y = self.read(x)
        x = self.read_norm(y) + y.relu()
        for _ in range(2):
            x = self.twice_norm(self.twice(x)).relu()
        x = self.standard_norm(self.standard(x))
        x = self.shared_norm(self.shared(x)) + self.sharer(x)
        x = self.alone(x.relu())
        x = F.adaptive_avg_pool2d(x, 3)
        x = self.wide_norm(self.wide(x.flatten(2).transpose(1, 2)))
        return x.mean(1)


def test_a_norm_that_is_no_part_of_the_layer_before_it_stays():
    torch.manual_seed(0)
    plain = drawn(models.Net(Awkward(), nn.Linear(4, 4)))
    folded, x = copy.deepcopy(plain), views()
    assert fold(folded, views(seed=2)) == 1 and isinstance(folded.backbone.mine, nn.Identity)
    assert len(norms(folded)) == len(norms(plain)) - 1
    with torch.no_grad():
        torch.testing.assert_close(folded(x).z, plain(x).z, rtol=1e-4, atol=1e-5)


class Odd(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_fold_that_changes_the_embedding_is_refused():
    torch.manual_seed(0)
    odd = drawn(
        models.Net(
            nn.Sequential(
                nn.Conv2d(3, 4, 3), Odd(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            ),
            nn.Linear(4, 4),
        )
    )
    with pytest.raises(UserError, match="teacher.fold=false"):
        Teacher(odd, Options(fold=True))


@pytest.mark.parametrize("folded", [False, True])
def test_bf16_is_near_the_plain_forward_in_fp32(folded):
    plain, x = net("resnet18"), views(size=64)
    t = Teacher(copy.deepcopy(plain), Options(dtype=torch.bfloat16, fold=folded))
    z = t(x).z
    with torch.no_grad():
        want = plain(x).z
    assert z.dtype == torch.float32 and z.shape == want.shape
    assert 0.9995 < F.cosine_similarity(z, want, dim=-1).min() < 1 - 1e-7
    assert {
        p.dtype
        for m in t.net.modules()
        if not isinstance(m, _BatchNorm)
        for p in m.parameters(recurse=False)
    } == {torch.bfloat16}
    assert {x.dtype for m in norms(t.net) for x in (m.weight, m.running_var)} == (
        set() if folded else {torch.float32}
    )
    for cast in (torch.float16, torch.bfloat16):  # a loader may hand over half precision
        assert F.cosine_similarity(t([v.to(cast) for v in x]).z, want, dim=-1).min() > 0.9995
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(t(x).z, z)


def test_an_overflow_in_half_precision_is_found_at_the_start():
    hot = net(bn=False)
    hot.head[0].weight.data *= 1e6
    hot.head[2].weight.data *= 1e-6
    assert torch.isfinite(
        Teacher(copy.deepcopy(hot), Options(dtype=torch.float32))(views()).z
    ).all()
    with pytest.raises(
        UserError, match="float16 has a cosine of nan.*teacher.precision=fp32 or bf16"
    ):
        Teacher(hot, Options(dtype=torch.float16, fold=True))


def test_a_network_of_another_image_size_is_refused_at_the_start():
    vit = net("vit_tiny_patch16_224", bn=False, depth=1)
    with pytest.raises(
        UserError, match="teacher.arch: .* images of 64 px .*224.*view.size.*dynamic_img_size"
    ):
        Teacher(copy.deepcopy(vit), Options(dtype=torch.float32, sizes=(64,)))
    assert Teacher(vit, Options(dtype=torch.float32, sizes=(224,)))(views(1, 2, 224)).z.shape == (
        1,
        2,
        16,
    )


@pytest.mark.parametrize("factor", [0.0, float("inf")], ids=["all zero", "infinite"])
def test_weights_that_embed_nothing_are_called_broken(factor):
    broken = net(bn=False)
    for p in broken.head.parameters():
        p.data *= factor
    with pytest.raises(UserError, match="teacher.file: .*no embedding.*broken"):
        Teacher(broken, Options(dtype=torch.float32, fold=True))


def test_the_fingerprint_is_of_the_weights_as_loaded():
    prints = {
        Teacher(net(), how).fingerprint
        for how in (
            Options(),
            Options(fold=True),
            Options(dtype=torch.bfloat16, fold=True),
            Options(bn_group=2),
        )
    }
    assert len(prints) == 1


@pytest.mark.parametrize("group", [2, 3, 32])
def test_batch_statistics_are_of_groups_of_a_view(group):
    """As the official code has them: a network in train mode, called with `group` images of one
    view at a time."""
    # Statistics of two images magnify what float32 rounds.
    plain = net("test_efficientnet").double()
    x = [v.double() for v in views(n=3, b=6)]
    t = Teacher(copy.deepcopy(plain), Options(bn_group=group))
    before = {k: v.clone() for k, v in t.net.state_dict().items()}
    z = t(x).z
    official = copy.deepcopy(plain).train()
    with torch.no_grad():
        want = torch.stack(
            [
                torch.cat([official.head(official.backbone(part)) for part in v.split(group)])
                for v in x
            ]
        )
        eval_mode = plain(x).z
    torch.testing.assert_close(z, want, rtol=1e-8, atol=1e-8)
    assert (z - eval_mode).abs().max() > 0.1
    # Running statistics and their counters.
    assert all(torch.equal(v, before[k]) for k, v in t.net.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in official.state_dict().items())


def test_a_group_that_does_not_divide_the_batch_is_refused():
    def micro(batch, group, bn="batch"):
        raw = {
            "run": {"name": "x"},
            "data": {"train": "x", "batch": batch},
            "teacher": {"file": "x", "bn": bn, "bn_group": group},
        }
        return config.micro_batch(config.validate(raw, "here"), 2)

    assert micro(64, 32) == 32 and micro(48, 32) == 24 and micro(96, 32, "eval") == 48
    with pytest.raises(UserError, match="teacher.bn_group: 32 does not divide the 48 images"):
        micro(96, 32)


def test_what_the_configuration_asks_for():
    def how(precision="auto", engine="fp32", device="cpu", graphs=True, **kwargs):
        return teacher.options(
            config.Teacher(file="x", precision=precision, **kwargs),
            engine,
            (224,),
            torch.device(device),
            graphs,
        )

    assert how() == Options(torch.device("cpu"), torch.float32, True, 0, False, (224,))
    assert how(engine="bf16").dtype == torch.bfloat16 and how("fp32", "bf16").dtype == torch.float32
    assert how(device="cuda") == Options(torch.device("cuda"), torch.float16, True, 0, True, (224,))
    assert (
        how(device="cuda", engine="bf16").dtype == torch.float16
        and how("bf16", device="cuda").dtype == torch.bfloat16
    )
    assert not how(device="cuda", graph=False).graph and not how(device="cuda", graphs=False).graph
    assert how(bn="batch", bn_group=16)[2:4] == (False, 16) and not how(fold=False).fold
    with pytest.raises(UserError, match="teacher.precision: fp16 needs a GPU"):
        how("fp16")
