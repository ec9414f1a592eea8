"""`fastdisco export`: its files give others the features of training, in processes without
fastdisco, and what cannot be exported is refused before anything is written."""

import contextlib
import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

from fastdisco import cli, config, models
from fastdisco.common.errors import UserError
from fastdisco.export import card, formats, onnx, place
from fastdisco.models import plain_timm
from fastdisco.run import checkpoint


def a_run(textures, out, arch, change=lambda net: None, **more):
    """The folder of a run that saved random weights, whose batch norms have seen something."""
    overrides = [
        f"data.train={textures}/train",
        f"data.val={textures}/val",
        f"run.out={out}",
        f"run.name={arch}",
        f"student.arch={arch}",
        "student.kwargs={}",
        *(f"{k}={v}" for k, v in more.items()),
    ]
    cfg = config.load(ROOT / "tests/tiny.yaml", overrides)
    torch.manual_seed(0)
    net = models.of(cfg)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = None
            nn.init.uniform_(m.weight, 0.5, 1.5)
    with torch.no_grad():
        net.train()([torch.randn(16, 3, 32, 32)])
    change(net.eval())
    run = out / arch
    run.mkdir(parents=True)
    items = {"student": checkpoint.Item(net.state_dict, net.load_state_dict)}
    checkpoint.save(run, 1, items, {}, 1)
    (run / "config.yaml").write_text(config.dump(cfg))
    return run


def export(capsys, *arguments, code=0):
    """The values of the last line, and all that was said."""
    assert cli.main(["export", *map(str, arguments)]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return (json.loads(out.splitlines()[-1]) if code != 2 else None), out + err


def refused(capsys, *arguments):
    """The one sentence of a refusal."""
    _, said = export(capsys, *arguments, code=2)
    lines = [x for x in said.splitlines() if x.startswith("fastdisco: error: ")]
    assert len(lines) == 1, said
    return lines[0]


@pytest.fixture(scope="module")
def run(textures, tmp_path_factory):
    return a_run(textures, tmp_path_factory.mktemp("runs"), "test_efficientnet")


@pytest.fixture(scope="module")
def exported(run):
    """The run's export to everything that its network can be, after a linear evaluation of it."""
    with contextlib.redirect_stdout(sys.stderr):
        assert cli.main(["eval", "probe", str(run), "probe.kinds=[ridge]", "probe.held=0.1"]) == 0
        assert (
            cli.main(
                ["export", str(run), "--to", "timm", "int8", "--max-drop=100", "probe.held=0.1"]
            )
            == 0
        )
    return run / "export"


@pytest.fixture(scope="module")
def features(run):
    """Five images and what the run's own network makes of them."""
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, models.from_run(run)[0].features(x)


# Features of plain timm in a process where fastdisco cannot be imported.
FRESH = """
import sys
sys.modules["fastdisco"] = None
import timm, torch
folder, checkpoint, arch, x = *sys.argv[1:4], torch.load(sys.argv[4])
nets = [
    timm.create_model(f"local-dir:{folder}", pretrained=True),
    timm.create_model(arch, num_classes=0, checkpoint_path=f"{folder}/model.safetensors"),
    timm.create_model(arch, num_classes=0, checkpoint_path=checkpoint),
]
config = timm.data.resolve_model_data_config(nets[0])
with torch.no_grad():
    torch.save(([net.eval()(x) for net in nets], config), sys.argv[5])
"""


def test_plain_timm_gives_the_features_of_training(run, exported, features, tmp_path):
    x, want = features
    torch.save(x, tmp_path / "x.pt")
    saved = run / "checkpoints/step_00000001/backbone.safetensors"
    places = (exported, saved, "test_efficientnet", tmp_path / "x.pt", tmp_path / "y.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, places)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    got, told = torch.load(tmp_path / "y.pt")
    assert len(got) == 3 and want.std() > 0.01
    for y in got:
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    cfg = config.load(run / "config.yaml")
    assert tuple(told["input_size"]) == (3, 32, 32) and told["interpolation"] == "bilinear"
    assert (*told["mean"], *told["std"]) == (*cfg.view.mean, *cfg.view.std)
    assert told["crop_pct"] == 1.0


def test_the_head_lies_apart(run, exported):
    head = models.read(exported / "head.safetensors")
    want = models.from_run(run)[0].head.state_dict()
    assert head.keys() == want.keys()
    assert all(torch.equal(head[k], want[k]) for k in want)
    assert not any(k.startswith("head") for k in models.read(exported / "model.safetensors"))


def test_onnxruntime_gives_the_features_for_any_batch(exported, features):
    x, want = features
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    for n in (1, 2, 5):
        (got,) = session.run(None, {"image": x[:n].numpy()})
        np.testing.assert_allclose(got, want[:n].numpy(), rtol=1e-4, atol=1e-4)
    about = json.loads((exported / "export.json").read_text())
    assert about["onnx"]["parity"] < 1e-4 and about["onnx"]["images"] == 60


def test_an_exported_file_is_a_network_for_evaluations(run, exported, capsys):
    def knn(net):
        assert cli.main(["eval", "knn", str(net), f"--out={exported.parent / 'knn'}"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["eval/knn_top1"]

    assert knn(exported / "model.onnx") == knn(run)
    about = json.loads((exported / "export.json").read_text())["int8"]
    assert knn(exported / "model.int8.onnx") == about["values"]["knn_top1"]
    assert knn(run) == about["fp32"]["knn_top1"]
    # The run has a linear result, so a classifier is made and measured on each file's own features.
    (linear,) = (run / "eval").glob("ridge-*.json")
    want = json.loads(linear.read_text())["values"]["ridge_top1_selected"]
    assert about["fp32"]["ridge_top1_selected"] == pytest.approx(want, abs=1 / 30 + 1e-9)
    assert about["values"].keys() == about["fp32"].keys() == {"knn_top1", "ridge_top1_selected"}
    # Both files' results lie where a table finds them, and pair.
    sides = [str(exported / "eval" / name) for name in ("model.int8", "model")]
    assert cli.main(["eval", "table", sides[0], "--versus", sides[1]]) == 0
    assert "knn_top1" in capsys.readouterr().out
    assert cli.main(["eval", "knn", str(exported / "model.onnx"), "data.eval_size=24"]) == 2
    assert "takes images of 32 pixels" in capsys.readouterr().err


def test_a_file_that_differs_from_the_network_is_refused(run, exported):
    net, _ = models.from_run(run)
    x = torch.randn(4, 3, 32, 32)
    assert onnx.parity(net.backbone, exported / "model.onnx", [x]) < 1e-5
    last = [m for m in net.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)][-1]
    with torch.no_grad():
        last.bias += 1e-2
    with pytest.raises(UserError, match="features differ by .* more than 0.0001"):
        onnx.parity(net.backbone, exported / "model.onnx", [x])
    with torch.no_grad():
        last.bias += float("nan")
    with pytest.raises(UserError, match="features differ by nan"):
        onnx.parity(net.backbone, exported / "model.onnx", [x])


@pytest.mark.skipif(not find_spec("timmx"), reason="timmx: not installed (Python 3.11 or later)")
def test_timmx_loads_the_folder(exported, features, tmp_path):
    from timmx.export.common import create_timm_model, resolve_input_size

    x, want = features
    made = dict(checkpoint=None, num_classes=None, in_chans=None)
    net = create_timm_model(f"local-dir:{exported}", pretrained=True, **made).eval()
    assert resolve_input_size(net, None) == (3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)


# ---- other names of weights


def subject(arch, size=32, **kwargs):
    torch.manual_seed(0)
    net = models.create(arch, lambda features: nn.Identity(), kwargs, (size,)).eval()
    view = formats.View(size, size, "linear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    return formats.Subject(
        net.backbone, net.head, arch, kwargs, net.backbone.num_features, view, "mit"
    )


def test_torchvision_lacks_the_classifier_alone(tmp_path):
    import torchvision

    s = subject("resnet18")
    formats.torchvision(s, tmp_path)
    net = torchvision.models.resnet18()
    lacks = net.load_state_dict(torch.load(tmp_path / "torchvision.pth"), strict=False)
    assert lacks.missing_keys == ["fc.weight", "fc.bias"] and not lacks.unexpected_keys
    net.fc = nn.Identity()
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), s.backbone(x), rtol=1e-5, atol=1e-5)


def detectron2_resnet(w, x, blocks, convs):
    """detectron2's ResNet written out over its names of weights: a stem, res2 to res5, and in a block
    convN with a norm and an optional shortcut."""

    def conv(name, x, stride=1):
        kernel = w[f"{name}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        norm = [w[f"{name}.norm.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *norm)

    x = F.max_pool2d(F.relu(conv("stem.conv1", x, 2)), 3, 2, 1)
    for stage, n in zip(("res2", "res3", "res4", "res5"), blocks):
        for i in range(n):
            stride, at = (2 if i == 0 and stage != "res2" else 1), f"{stage}.{i}"
            # STRIDE_IN_1X1 False: the 3x3 convolution has the stride.
            strides = [stride, 1] if convs == 2 else [1, stride, 1]
            y = x
            for c in range(convs):
                y = conv(f"{at}.conv{c + 1}", y, strides[c])
                y = F.relu(y) if c < convs - 1 else y
            short = conv(f"{at}.shortcut", x, stride) if f"{at}.shortcut.weight" in w else x
            x = F.relu(y + short)
    return x.mean((2, 3))


@pytest.mark.parametrize(
    "arch,blocks,convs", [("resnet18", (2, 2, 2, 2), 2), ("resnet50", (3, 4, 6, 3), 3)]
)
def test_detectron2_names(tmp_path, arch, blocks, convs):
    s = subject(arch)
    formats.detectron2(s, tmp_path)
    found = torch.load(tmp_path / "detectron2.pth", weights_only=True)
    assert found["matching_heuristics"] is True
    w, x = found["model"], torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        got, want = detectron2_resnet(w, x, blocks, convs), s.backbone(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    # Nothing that detectron2 has no place for.
    assert all(k.startswith(("stem.", "res2.", "res3.", "res4.", "res5.")) for k in w)
    assert not [k for k in w if "tracked" in k or "downsample" in k or ".bn" in k]


@pytest.mark.parametrize(
    "arch,kwargs,size",
    [("test_vit", {}, 64), ("test_efficientnet", {"drop_rate": 0.1}, 32), ("test_resnet", {}, 32)],
)
def test_timm_makes_each_kind_of_network(tmp_path, arch, kwargs, size):
    s = subject(arch, size, **kwargs)
    formats.timm(s, tmp_path)
    net, x = plain_timm.from_folder(tmp_path), torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(net(x), s.backbone(x), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["num_features"] == s.features


def test_several_students_leave_a_backbone_each(tmp_path):
    nets = {"a": nn.Linear(2, 3), "b": nn.Linear(4, 5)}
    whole = {
        n: {f"backbone.{k}": x for k, x in net.state_dict().items()} for n, net in nets.items()
    }
    items = {
        f"{n}/student": checkpoint.Item(
            lambda n=n: whole[n] | {"head.weight": torch.ones(1)}, print
        )
        for n in nets
    }
    checkpoint.save(tmp_path, 7, items, {}, 1)
    for n, net in nets.items():
        found = models.read(tmp_path / f"checkpoints/step_00000007/backbone-{n}.safetensors")
        assert found.keys() == net.state_dict().keys()
        assert torch.equal(found["weight"], net.weight)


# ---- the card


def test_the_card_says_what_people_ask(run, exported, capsys):
    assert cli.main(["eval", "knn", str(run)]) == 0
    values, _ = export(capsys, run, "--to", "timm", "--licence", "mit")
    assert values == {"test_efficientnet": {"folder": str(exported)}}
    text = (exported / "README.md").read_text()
    (result,) = (run / "eval").glob("knn-*.json")
    found = json.loads(result.read_text())
    assert "| network | student of a run, step_00000001 |" in text
    assert "license: mit" in text and "library_name: timm" in text
    assert f"| knn_top1 | {100 * found['values']['knn_top1']:.2f} |" in text
    assert (
        f"`{found['hash']}`" in text
        and "| method | moco |" in text
        and "| teacher | none |" in text
    )
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    # What an earlier export of the same weights measured stays.
    assert "## int8" in text and (exported / "model.onnx").exists()


@pytest.mark.parametrize(
    "source,want",
    [
        ("a MoCo v1 or v2 or official DisCo checkpoint (encoder_q.*)", "cc-by-nc-4.0"),
        ("a full DINO checkpoint (backbone.* and head.mlp.* in teacher)", "apache-2.0"),
        ("untrained", "unknown"),
    ],
)
def test_the_teachers_licence_passes_on(source, want):
    assert card.origin(config.Config.model_construct(), source, None, None).licence == want
    assert card.origin(config.Config.model_construct(), source, None, "mit").licence == "mit"


# ---- refusals


def test_bad_input_is_one_sentence_and_writes_nothing(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert "leave torchvision out" in refused(capsys, run, "--to", "torchvision", f"--out={out}")
    assert "leave detectron2 out" in refused(
        capsys, run, "--to", "timm", "detectron2", f"--out={out}"
    )
    assert "nothing to do" in refused(capsys, run)
    assert "--to: tflite is none of timm" in refused(capsys, run, "--to", "tflite")
    assert "named twice" in refused(capsys, run, run, "--to", "timm")
    assert "--max-drop: is nan" in refused(capsys, run, "--to", "int8", "--max-drop=nan")
    assert "is no result" not in refused(capsys, tmp_path / "none", "--to", "timm")
    assert "give the images" in refused(capsys, "timm:test_vit", "--untrained", "--to", "onnx")
    assert "data.val" in refused(capsys, run, "--to", "int8", "data.val=null", f"--out={out}")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused(
        capsys, run, "--to", "int8", f"--calibrate={empty}", f"--out={out}"
    )
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'fastdisco[onnx]'" in refused(capsys, run, "--to", "onnx", f"--out={out}")
    assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_foreign_folders_are_left_alone(run, tmp_path, capsys):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    assert "holds files but no export" in refused(capsys, run, "--to", "timm", f"--out={tmp_path}")
    assert "is a file" in refused(capsys, run, "--to", "timm", f"--out={note}")
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"] and note.read_text() == "mine"


def test_a_network_without_images_becomes_weights(tmp_path, capsys):
    export(capsys, "timm:test_vit", "--untrained", "--to", "timm", f"--out={tmp_path / 'vit'}")
    assert plain_timm.from_folder(tmp_path / "vit").num_features == 64


def test_timm_has_no_widened_resnet():
    with pytest.raises(UserError, match="timm does not have; leave timm out"):
        plain_timm.arguments("resnet50w2", {}, nn.Identity())


def test_files_of_other_weights_go_and_others_files_stay(tmp_path):
    folder = tmp_path / "export"
    for keep in (False, True, False):
        with place.staged(folder, keep) as stage:
            (stage / ("model.onnx" if not keep else "model.safetensors")).write_text("x")
            (stage / "model.int8.onnx.rejected" if keep else stage / "model.int8.onnx").write_text(
                "x"
            )
            (stage / "export.json").write_text(json.dumps({"network": {"fingerprint": "a"}}))
        if keep:
            assert (folder / "model.onnx").exists() and not (folder / "model.int8.onnx").exists()
        (folder / "notes.txt").write_text("mine")
    assert sorted(p.name for p in folder.iterdir()) == [
        "export.json",
        "model.int8.onnx",
        "model.onnx",
        "notes.txt",
    ]
    assert place.earlier(folder, "a") and not place.earlier(folder, "b")
    with pytest.raises(FileNotFoundError), place.staged(folder, False) as stage:
        (stage / "model.onnx").write_bytes((stage / "none").read_bytes())
    assert (folder / "model.onnx").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
