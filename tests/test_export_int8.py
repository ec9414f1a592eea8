"""int8: only what is measured on the file counts; a network that collapses is found out, the layers
to blame are named and kept in float, and what stays beyond the gate is rejected."""

import json

import numpy as np
import onnx as onnx_format
import onnxruntime
import pytest
import torch
from test_export import a_run, export
from torch import nn

from fastdisco import models
from fastdisco.commands import export as command
from fastdisco.export import bench, int8, onnx
from fastdisco.export.int8 import Layer


class Small(nn.Module):
    """Two convolutions with a pooled output."""

    def __init__(self, spread=1.0):
        """spread: one channel between the two is so much larger, and is scaled back after; the
        float output is the same."""
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        with torch.no_grad():
            self.first.weight[0] *= spread
            self.first.bias[0] *= spread
            self.second.weight[:, 0] /= spread

    def forward(self, x):
        return self.second(self.first(x).relu()).mean((2, 3))


def small(tmp_path, spread=1.0):
    """The network, its file, and images."""
    torch.manual_seed(0)
    net = Small(spread).eval()
    images = torch.randn(16, 3, 8, 8)
    onnx.write(net, 8, tmp_path / "f.onnx", {})
    return net, tmp_path / "f.onnx", images


def error(net, file, images):
    with torch.no_grad():
        want = net(images).numpy()
    got = onnxruntime.InferenceSession(file).run(None, {"image": images.numpy()})[0]
    return float(np.square(got - want).sum() / np.square(want - want.mean(0)).sum())


def test_convolutions_alone_are_in_int8_per_channel(tmp_path):
    net, file, images = small(tmp_path)
    quantiser = int8.Quantiser(file, [images.numpy()])
    assert quantiser.layers == ["first", "second"]
    quantiser.write(tmp_path / "q.onnx", quantiser.layers)
    graph = onnx_format.load(tmp_path / "q.onnx").graph
    stored = {w.name: onnx_format.numpy_helper.to_array(w) for w in graph.initializer}
    weights = [w for w in stored.values() if w.dtype == np.int8 and w.ndim == 4]
    assert sorted(w.shape for w in weights) == [(6, 8, 3, 3), (8, 3, 3, 3)]
    assert [s.shape for n, s in stored.items() if "weight_scale" in n] == [(8,), (6,)]
    # Of ranges of this size int8 keeps the features to a percent or two.
    assert error(net, tmp_path / "q.onnx", images) < 0.01
    quantiser.write(tmp_path / "q.onnx", ["second"])
    left = {w.name: w for w in onnx_format.load(tmp_path / "q.onnx").graph.initializer}
    assert onnx_format.numpy_helper.to_array(left["first.weight"]).dtype == np.float32


def test_the_layer_that_collapses_costs_most(tmp_path):
    net, file, images = small(tmp_path, spread=1e4)
    quantiser = int8.Quantiser(file, [images.numpy()])
    costs = quantiser.costs(file)
    assert {layer.name for layer in costs} == {"first", "second"}
    # The float file is as good as ever; either layer alone carries the one large channel.
    assert error(net, file, images) < 1e-8
    assert min(layer.cost for layer in costs) > 0.3
    healthy = small(tmp_path)[1]
    assert max(x.cost for x in int8.Quantiser(healthy, [images.numpy()]).costs(healthy)) < 0.01


def search(scores, costs, most, want=0.8):
    """The search over layers a to h, where the file's accuracy is a function of what is in float."""
    written, calls = [], []

    def measure():
        return {"knn_top1": scores({*"abcdefgh"} - {*written[-1]})}

    def ranked():
        calls.append(1)
        return [Layer(name, cost) for name, cost in costs.items()]

    found = int8.search([*"abcdefgh"], written.append, measure, ranked, {"knn_top1": want}, most)
    return found, written, calls


COSTS = dict(c=9.0, a=5.0, b=1.0, d=0.5, e=0.4, f=0.3, g=0.2, h=0.1)


def test_a_good_file_is_taken_at_once():
    found, written, calls = search(lambda floats: 0.795, COSTS, 1.0)
    assert found.passed and found.best.floats == () and not calls and len(written) == 1
    assert found.best.drop == pytest.approx(0.5)


def test_the_costliest_stay_in_float_until_it_is_good_enough():
    found, written, calls = search(lambda f: 0.8 if {"c", "a"} <= f else 0.1, COSTS, 1.0)
    assert found.passed and found.best.floats == ("c", "a") and len(calls) == 1
    assert [8 - len(w) for w in written] == [0, 1, 2]
    assert [round(t.drop) for t in found.tries] == [70, 70, 0]


def test_what_never_is_good_enough_is_the_best_try():
    score = {0: 0.1, 1: 0.7, 2: 0.3, 4: 0.5}
    found, written, _ = search(lambda f: score[len(f)], COSTS, 1.0)
    assert not found.passed and found.best.floats == ("c",)
    assert found.best.drop == pytest.approx(10)
    # The file is that of the best try, and no more than half of the layers were given up.
    assert {*written[-1]} == {*"abdefgh"} and [len(t.floats) for t in found.tries] == [0, 1, 2, 4]


def test_a_file_that_tells_nothing_never_passes():
    found, _, _ = search(lambda f: 0.8, COSTS, 100)
    assert found.passed
    none = int8.search(["a"], lambda x: None, dict, list, {"knn_top1": 0.5}, 100)
    assert not none.passed and none.best.values == {} and none.best.drop == 100


def test_the_drop_is_the_largest_and_what_is_no_number_is_lost():
    want = {"knn_top1": 0.5, "ridge_top1_selected": 0.6}
    assert int8.dropped(want, {"knn_top1": 0.51, "ridge_top1_selected": 0.57}) == pytest.approx(3)
    assert int8.dropped(want, {"knn_top1": 0.6, "ridge_top1_selected": 0.7}) == pytest.approx(-10)
    assert int8.dropped(want, {"knn_top1": float("nan"), "ridge_top1_selected": 0.6}) == 100
    assert int8.dropped(want, {"knn_top1": 0.5}) == 100


def test_the_share_of_the_first_direction():
    """Of more images than features, and of fewer: variances 9, 0.75 and 0.25 in turned directions."""
    draw = np.random.default_rng(0)
    turn = np.linalg.qr(draw.normal(size=(8, 8)))[0]
    columns = np.linalg.qr(draw.normal(size=(64, 3)))[0]
    columns = np.linalg.qr(columns - columns.mean(0))[0]
    x = columns * np.sqrt([9, 0.75, 0.25]) @ turn[:3] + 5
    assert int8.leading(x) == pytest.approx(0.9)
    assert int8.leading(np.pad(x, ((0, 0), (0, 100)))) == pytest.approx(0.9)
    assert int8.leading(np.ones((4, 3))) == 1.0


# ---- the command


def collapsing(net):
    """One channel in the stem is so large that int8 has no step left for the others; the float
    features stay, since what reads it is scaled back."""
    _, norm, _, reader, *_ = net.backbone.conv1
    with torch.no_grad():
        norm.weight[0] *= 1e5
        norm.bias[0] *= 1e5
        reader.weight[:, 0] /= 1e5


@pytest.fixture(scope="module")
def collapsed(textures, tmp_path_factory):
    out = tmp_path_factory.mktemp("collapsed")
    return a_run(textures, out, "test_resnet", collapsing)


def test_a_network_made_to_collapse_is_kept_in_float_where_it_does(collapsed, capsys):
    values, said = export(capsys, collapsed, "--to", "int8", "--max-drop", "4")
    found = json.loads((collapsed / "export/export.json").read_text())["int8"]
    assert found["tries"][0]["drop"] > 4 and found["passed"] and found["drop"] <= 4
    # One writes the large channel, and one reads it.
    assert found["floats"][0] in ("conv1.0", "conv1.3")
    assert "costliest layers in int8" in said and found["floats"][0] in said
    assert values["test_resnet"]["int8_drop"] == found["drop"]
    assert (collapsed / "export/model.int8.onnx").exists()
    assert "fp32: knn_top1" in said and "points lost" in said


def test_beyond_the_gate_it_is_rejected(collapsed, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(int8, "MOST", 0)
    out = tmp_path / "out"
    values, said = export(
        capsys, collapsed, "--to", "int8", f"--out={out}", "--max-drop=4", code=command.REJECTED
    )
    assert "of the variance of the float32 features lies in one direction" in said
    found = json.loads((out / "export.json").read_text())["int8"]
    assert 0 < found["first_direction"] <= 1
    assert (out / "model.int8.onnx.rejected").exists() and not (out / "model.int8.onnx").exists()
    assert values["test_resnet"]["int8_rejected"] and "more than --max-drop 4" in said
    assert "It was rejected" in (out / "README.md").read_text()


# ---- the bench


def test_macs_are_those_of_the_textbook():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 1, groups=2), nn.Flatten())
    assert bench.macs(net, 16) == 8 * 8 * (8 * 27 + 4 * 4)
    # He et al., arXiv:1512.03385, table 1: 1.8e9.
    r18 = models.create("resnet18", lambda f: nn.Identity()).backbone.eval()
    assert bench.macs(r18, 224) == pytest.approx(1.8e9, rel=0.02)


def test_the_bench_measures_every_form(tmp_path):
    net, file, images = small(tmp_path)
    int8.Quantiser(file, [images.numpy()]).write(tmp_path / "q.onnx", ["first", "second"])
    forms = [
        bench.Form("small", "torch", net, None, 8),
        bench.Form("small", "onnx", net, file, 8),
        bench.Form("small", "int8", net, tmp_path / "q.onnx", 8),
    ]
    threads = torch.get_num_threads()
    rows = bench.measure(forms, 3)
    assert torch.get_num_threads() == threads
    assert [r["form"] for r in rows] == ["torch", "onnx", "int8"]
    for row, form in zip(rows, forms):
        assert row["weights"] == 3 * 8 * 9 + 8 + 8 * 6 * 9 + 6
        assert row["macs"] == 64 * (8 * 27 + 6 * 72)
        for what in ("1_thread", "all_threads"):
            assert 0 < row[f"p50_ms_{what}"] <= row[f"p95_ms_{what}"]
        assert row["images_per_s"] > 0 and all(len(x) == 3 for x in row["rounds_s"].values())
        assert form.file is None or row["bytes"] == form.file.stat().st_size
    lines = bench.lines(rows)
    assert len(lines) == 4 and {len(x) for x in lines} == {11}


def test_several_networks_stand_in_one_table(tmp_path, capsys):
    nets, names = (
        ("timm:test_efficientnet", "timm:test_resnet"),
        ("test_efficientnet", "test_resnet"),
    )
    size = ("data.eval_size=32", "data.eval_resize=32")
    out = tmp_path / "out"
    values, said = export(
        capsys, *nets, "--untrained", "--bench=cpu", "--rounds=1", f"--out={out}", *size
    )
    assert said.count("M MACs") == 1
    for name in names:
        found = json.loads((out / name / "bench.json").read_text())
        assert [r["network"] for r in found["rows"]] == [name]
        assert found["machine"]["versions"]["torch"] and found["machine"]["cores"] > 0
        assert values[name]["torch/macs"] == found["rows"][0]["macs"]
