"""MoCo v3, SEED, MMSelfSup and DisCo on SwAV, wrappers of names, and layouts that are told by name."""

import itertools
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from layouts import (
    agree,
    conv,
    dino,
    dino_head,
    image,
    linear,
    norm,
    refused,
    save,
    small_resnet,
    small_swav,
    vit_small,
)
from plain_forwards import Plain

from fastdisco.teacher import formats

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tmp_path(tmp_path):
    """Emptied after each test: its checkpoints have 45 MB each."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def moco_head(name, hidden=24, dim=16, width=512):
    state = {}
    linear(state, f"{name}.0", hidden, width)
    linear(state, f"{name}.2", dim, hidden)
    return state


def moco_head_forward(x, state, name):
    p = Plain(state)
    return p.linear(F.relu(p.linear(x, f"{name}.0")), f"{name}.2")


def moco_v3_head(name, layers, width, hidden, dim=16):
    """Linear layers without bias and batch norms, the last of which has no weights."""
    state, at = {}, 0
    for i in range(layers):
        out = dim if i == layers - 1 else hidden
        state[f"{name}.{at}.weight"] = torch.randn(out, width) / width**0.5
        norm(state, f"{name}.{at + 1}", out)
        width, at = out, at + 3
    del state[f"{name}.{at - 2}.weight"], state[f"{name}.{at - 2}.bias"]
    return state


def moco_v3_head_forward(x, state, name, layers):
    p = Plain(state)
    for i in range(layers):
        at = 3 * i
        x = p.bn(p.linear(x, f"{name}.{at}"), f"{name}.{at + 1}")
        if i < layers - 1:
            x = F.relu(x)
    return x


def moco_v3(backbone, head):
    own = backbone | head
    rest = prefixed("momentum_encoder.", own) | moco_v3_head("predictor", 2, 16, 24)
    return {"epoch": 300, "state_dict": prefixed("module.", prefixed("base_encoder.", own) | rest)}


def embedding(source, x):
    with torch.no_grad():
        return source.net.eval()([x]).z[0]


# ---- formats that are read


def test_moco_v3s_resnet(tmp_path):
    torch.manual_seed(0)
    net, head = small_resnet(), moco_v3_head("fc", 2, 512, 24)
    source = formats.read(save(tmp_path, moco_v3(net.state_dict(), head)))
    assert (source.arch, source.kwargs, source.dim) == ("resnet18", {}, 16)
    assert "MoCo v3" in source.format and {*source.ignored} == {"momentum encoder", "predictor"}
    x = image()
    with torch.no_grad():
        want = moco_v3_head_forward(net(x), head, "fc", 2)
    agree(embedding(source, x), want)


@pytest.mark.parametrize("arch", [None, "vit_small_patch16_224"])
def test_moco_v3s_vit_small_has_twelve_heads_of_attention(tmp_path, arch):
    """timm's has 6, and no shape tells."""
    torch.manual_seed(0)
    backbone, head = vit_small(), moco_v3_head("head", 3, 384, 24)
    file = save(tmp_path, moco_v3(backbone, head))
    source = formats.read(file, arch)
    assert (source.arch, source.kwargs) == ("vit_small_patch16_224", {"num_heads": 12})
    x = image(224)
    with torch.no_grad():
        want = moco_v3_head_forward(Plain(backbone).vit(x, heads=12), head, "head", 3)
    agree(embedding(source, x), want)
    # Unless one says otherwise.
    assert formats.read(file, "vit_small_patch16_224", {"num_heads": 6}).kwargs == {"num_heads": 6}


@pytest.mark.parametrize("mlp", [True, False])
def test_a_student_of_seed_teaches(tmp_path, mlp):
    torch.manual_seed(0)
    net, head = small_resnet(), {}
    if mlp:
        head = moco_head("fc")
    else:
        linear(head, "fc", 16, 512)
    teacher = prefixed("teacher.", moco_head("fc", width=2048))
    state = prefixed("student.", net.state_dict() | head) | teacher
    state |= {"queue": torch.ones(16, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    found = {"epoch": 200, "arch": "resnet18", "state_dict": prefixed("module.", state)}
    source = formats.read(save(tmp_path, found))
    assert (source.arch, source.dim) == ("resnet18", 16) and "SEED" in source.format
    assert source.ignored == {
        "teacher of its training by SEED": [*teacher],
        "negatives of its training": ["queue", "queue_ptr"],
    }
    x = image()
    with torch.no_grad():
        y = net(x)
        want = moco_head_forward(y, head, "fc") if mlp else Plain(head).linear(y, "fc")
    agree(embedding(source, x), want)


def test_an_encoder_of_mmselfsup(tmp_path):
    torch.manual_seed(0)
    net, head = small_resnet(), moco_head("mlp")
    state = prefixed("encoder_q.0.", net.state_dict()) | prefixed("encoder_q.1.", head)
    both = state | prefixed("encoder_k.0.", net.state_dict()) | {"queue": torch.ones(16, 8)}
    # Its class has the backbone twice.
    both |= prefixed("backbone.", net.state_dict())
    source = formats.read(save(tmp_path, {"meta": {"epoch": 200}, "state_dict": both}))
    assert (source.arch, source.dim) == ("resnet18", 16) and "MMSelfSup" in source.format
    assert len(source.ignored["encoder_q.0 once more"]) == len(net.state_dict())
    x = image()
    with torch.no_grad():
        want = moco_head_forward(net(x), head, "mlp")
    agree(embedding(source, x), want)
    # But not where it is another.
    both["backbone.conv1.weight"] = both["backbone.conv1.weight"] + 1
    refused(
        save(tmp_path, {"state_dict": both}),
        "unexpected: backbone.conv1.weight (not of encoder_q.0 or encoder_q.1)",
    )


def test_an_efficientnet_of_disco_on_swav_has_a_classifier_without_use(tmp_path):
    torch.manual_seed(0)
    net, head = timm.create_model("efficientnet_b0").eval(), {}
    linear(head, "projection_head.0", 24, 1280)
    norm(head, "projection_head.1", 24)
    linear(head, "projection_head.3", 16, 24)
    assert "classifier.weight" in net.state_dict()
    source = formats.read(
        save(tmp_path, {"state_dict": prefixed("module.", net.state_dict() | head)})
    )
    assert source.arch == "efficientnet_b0"
    assert source.ignored == {
        "classifier that its training leaves alone": ["classifier.weight", "classifier.bias"]
    }
    net.reset_classifier(0)
    p, x = Plain(head), image()
    with torch.no_grad():
        y = F.relu(p.bn(p.linear(net(x), "projection_head.0"), "projection_head.1"))
        want = p.linear(y, "projection_head.3")
    # Its images hardly differ, since it is untrained.
    torch.testing.assert_close(embedding(source, x), want)


def test_what_is_strange_in_each_format_is_named(tmp_path):
    torch.manual_seed(0)
    stranger = {"strange.weight": torch.ones(1)}
    net = small_resnet().state_dict()
    seed = prefixed("student.", net | moco_head("fc"))
    refused(save(tmp_path, seed | stranger), "unexpected: strange.weight (not of student)")
    v3 = moco_v3(net, moco_v3_head("fc", 2, 512, 24))["state_dict"]
    refused(save(tmp_path, v3 | stranger), "unexpected: strange.weight (not of base_encoder)")
    del v3["module.base_encoder.fc.4.running_var"]
    refused(save(tmp_path, v3), "missing: head.4.running_var")
    both = dino(net, dino_head({}, 512, 24))
    both["teacher"] |= stranger
    refused(save(tmp_path, both), "unexpected: strange.weight (not of backbone or head)")


# ---- wrappers

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def wrapped(state, before, after):
    """Names with wrappers before and after the first part: module.encoder_q._orig_mod.conv1.weight."""
    out = {}
    for key, x in state.items():
        first, _, rest = key.partition(".")
        out[".".join((*before, first, *after, rest))] = x
    return out


def wrappings():
    for before in itertools.chain([()], *(itertools.permutations(WRAPPERS[:2], n) for n in (1, 2))):
        for after in ((), ("_orig_mod",), ("_orig_mod", "module"), ("_fsdp_wrapped_module",) * 2):
            yield before, after
    yield ("module", "module"), ("_checkpoint_wrapped_module",)


def test_wrappers_in_any_order_and_number_are_stripped(monkeypatch):
    torch.manual_seed(0)
    net = small_resnet().state_dict()
    moco = prefixed("encoder_q.", net | moco_head("fc"))
    swav = small_swav(prefix="")[0]
    full = dino(net, dino_head({}, 512, 24))
    held = {}
    monkeypatch.setattr(formats.models, "read", lambda file: held)
    want = {}
    for before, after in wrappings():
        for name, state in (
            ("moco", {"state_dict": wrapped(moco, before, after)}),
            ("bare", wrapped(moco, before, after)),
            ("swav", wrapped(swav, before, after if len(before) else ())),
            ("dino", full | {"teacher": wrapped(full["teacher"], before, after)}),
        ):
            held = state
            got = {k: v.double().sum() for k, v in formats.read(Path("x")).net.state_dict().items()}
            assert want.setdefault(name, got) == got, (name, before, after)


def test_two_weights_that_wrappers_alone_tell_apart_are_refused(tmp_path):
    torch.manual_seed(0)
    state = prefixed("encoder_q.", small_resnet().state_dict() | moco_head("fc"))
    state["module.encoder_q.conv1.weight"] = state["encoder_q.conv1.weight"] + 1
    refused(
        save(tmp_path, {"state_dict": state}),
        "unexpected: module.encoder_q.conv1.weight (twice) (not of encoder_q)",
    )
    # The other way round the second has no wrapper, and still is the second.
    state = {"module.fc.weight": torch.ones(1), "fc.weight": torch.zeros(1)}
    assert {*formats.unwrapped(state)} == {"fc.weight", "fc.weight (twice)"}


# ---- formats that are told


def bn_head(name):
    state = {}
    linear(state, f"{name}.0", 24, 512)
    norm(state, f"{name}.1", 24)
    linear(state, f"{name}.3", 16, 24)
    return state


def test_known_layouts_that_are_not_read_are_told_by_name(tmp_path):
    torch.manual_seed(0)
    net = small_resnet().state_dict()
    of = lambda prefix, head: {"state_dict": prefixed(prefix, net) | head}
    conv(own := {}, "student._conv_stem", 32, 3, 3)
    conv(mobile := {}, "student.features.0.0", 16, 3, 3)
    linear(mobile, "student.classifier.0", 1280, 960)
    cases = [
        (of("backbone.", moco_head("projector")), "solo-learn, Barlow Twins or VICReg"),
        (of("module.backbone.", bn_head("module.projector")), "solo-learn, Barlow Twins or VICReg"),
        (of("encoder.", moco_head("projector")), "an early solo-learn"),
        (of("backbone.", moco_head("projection_head.layers")), "lightly"),
        (of("backbone.0.", bn_head("projection_head.layers")), "lightly"),
        (of("backbone.", moco_head("neck.mlp")), "MMSelfSup 1 or MMPretrain"),
        (of("module.encoder.", bn_head("module.predictor")), "SimSiam"),
        (
            {"classy_state_dict": {"base_model": {"model": {"trunk": net, "heads": {}}}}},
            "VISSL",
        ),
        ({"state_dict": prefixed("module.", own)}, "SEED's own EfficientNet"),
        ({"state_dict": prefixed("module.", mobile)}, "SEED's own MobileNetV3"),
    ]
    for found, name in cases:
        refused(save(tmp_path, found), "is a", name, "read")
        with pytest.raises(formats.UserError) as e:
            formats.read(tmp_path / "file.pth")
        assert "no projection head" not in str(e.value) and "known format" not in str(e.value)
        assert "docs/teachers.md" in str(e.value) or "take another" in str(e.value)


def test_an_encoder_without_its_prefix_is_told(tmp_path):
    torch.manual_seed(0)
    net = small_resnet().state_dict()
    file = save(tmp_path, net | moco_head("fc"))
    refused(file, "holds resnet18 and fc.0.weight, fc.2.weight", "put encoder_q. before each name")
    assert formats.read(save(tmp_path, prefixed("encoder_q.", net | moco_head("fc")))).dim == 16
    refused(save(tmp_path, prefixed("backbone.", net)), "holds resnet18 alone")


def test_a_teacher_of_dino_alone_is_read(tmp_path):
    """As the command for pickled networks writes it."""
    torch.manual_seed(0)
    full = dino(small_resnet().state_dict(), dino_head({}, 512, 24))
    source = formats.read(save(tmp_path, full["teacher"]))
    assert "DINO" in source.format and source.dim == 256


@pytest.mark.parametrize(
    "library, backbone, head, second",
    [
        ("solo-learn", "backbone.", moco_head, "projector"),
        ("solo-learn", "backbone.", bn_head, "projector"),
        ("MMSelfSup", "backbone.", moco_head, "neck.mlp"),
        ("lightly", "backbone.", moco_head, "projection_head.layers"),
    ],
)
def test_other_layouts_are_read_once_renamed_as_the_page_says(
    tmp_path, monkeypatch, library, backbone, head, second
):
    torch.manual_seed(0)
    net, own = small_resnet().state_dict(), head(second)
    if library == "lightly":
        # The children of a ResNet in a Sequential.
        places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
        net = {re.sub(r"^\w+", lambda m: str(places[m[0]]), k): v for k, v in net.items()}
    found = {"state_dict": prefixed(backbone, net) | own | {"momentum_backbone.x": torch.ones(1)}}
    torch.save(found, tmp_path / "other.ckpt")
    page = (ROOT / "docs/teachers.md").read_text()
    section = page[page.index("## Other layouts") :]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    # The row of the table in place of the example's names.
    rows = [row for row in re.findall(r"^\| (.*) \|$", section, re.M) if library in row]
    kind = "batch norm" if head is bn_head else "linear, ReLU, linear"
    row = next(row for row in rows if kind in row or len(rows) == 1)
    names = re.search(r"`(\{.*?\})`", row)[1]
    code = re.sub(r"names = \{.*?\}", f"names = {names}", code, flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/teachers.md", "exec"), {})
    source = formats.read(tmp_path / "teacher.pth.tar")
    assert (source.arch, source.dim) == ("resnet18", 16)
    assert torch.equal(source.net.head[0].weight, own[f"{second}.0.weight"])
