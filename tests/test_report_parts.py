"""The parts of a report against constructed cases with a known answer."""

import json
import math
import os

import numpy as np
import pytest
import reports
import torch

from fastdisco import config, data, models, report
from fastdisco.common.urls import Url
from fastdisco.evals import results
from fastdisco.evals.features import Features
from fastdisco.report import (
    collect,
    curves,
    differences,
    maps,
    neighbours,
    networks,
    page,
    pareto,
    scale,
)
from fastdisco.report import tiles as sheets
from fastdisco.report import views as augmented
from fastdisco.report.networks import ALONE, DISTILLED, TEACHER, Network
from fastdisco.report.pareto import Mark, Point


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return reports.images(tmp_path_factory.mktemp("images"))


def read(*folders):
    return report.read(folders)


# ---- curves


def test_many_points_are_averaged(root, tmp_path):
    folder = reports.run(root, "long", weights=False)
    lines = [{"step": i, "time": 3600.0 * i, "train/loss": float(i)} for i in range(1, 1001)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run,) = read(folder)
    loss = curves.over_steps([run])[0]
    assert loss.averaged == 3 and len(loss.lines[0]["x"]) == 334
    assert loss.lines[0]["x"][:2] == [2, 5] == loss.lines[0]["y"][:2]
    # What is left at the end has a point, too.
    assert loss.lines[0]["x"][-1] == 1000
    assert curves.unit([run]) == ("hours", 3600.0)


def test_what_is_not_known_gets_a_chart_too(root):
    folder = reports.run(root, "strange", weights=False)
    line = {"step": 1, "train/loss_entropy": 1.0, "train/epoch": 1, "eval/odd": 2.0, "perf/x": 3}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    charts = {c.key: c for c in curves.over_steps(read(folder))}
    assert charts["train/loss_entropy"].title == "Loss term: entropy"
    assert charts["eval/odd"].lines and not {"train/epoch", "perf/x"} & charts.keys()
    assert charts["distill/cosine"].lacking == "No run has a teacher, so there is no cosine to one."


def test_images_that_broke_stand_on_the_time_axis(root):
    folder = reports.run(root, "broken", weights=False)
    line = {"step": 1, "time": 60.0, "data/set_aside": 2}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    charts = {c.title: c for c in curves.over_time(read(folder))}
    assert charts["Images set aside, since they broke"].lines[0]["y"] == [2]


def test_differences(root):
    one = reports.run(root, "one", weights=False)
    two = reports.run(root, "two", weights=False, optim__lr=0.5, student__arch="test_resnet")
    runs = read(one, two)
    assert dict(differences.configurations(runs)) == {
        "optim.lr": ["0.05", "0.5"],
        "student.arch": ["test_efficientnet", "test_resnet"],
    }
    alone = dict(differences.configurations(runs[:1]))
    assert alone["optim.lr"] == ["0.05"] and alone["data.val"] == [f"{root}/val"]
    assert differences.environments(runs) == []


# ---- accuracy and cost


def test_ticks():
    even = scale.around([20.0, 30.0], 0, 100)
    assert [text for _, text in even.ticks()] == ["20", "22", "24", "26", "28", "30"]
    assert even.ticks()[0][0] == even.at(20) and even.at(25) == 50
    wide = scale.around([1.0, 100.0], 0, 100, log=True)
    assert wide.log and [text for _, text in wide.ticks()] == [
        "1",
        "2",
        "5",
        "10",
        "20",
        "50",
        "100",
    ]
    assert wide.at(10) == 50
    # One value alone has an axis, and so has zero.
    assert scale.around([5.0], 0, 10).at(5) == 5 and scale.around([0.0], 0, 10).at(0) == 5
    assert not scale.around([0.0, 9.0], 0, 1, log=True).log


def test_the_front_is_what_nobody_beats():
    points = {"a": (1, 50), "b": (2, 60), "c": (2, 40), "d": (3, 55), "e": (4, 10)}
    marks = [
        Mark(x, y, Point(name, 0, "torch", name == "e", {}, {}), name)
        for name, (x, y) in points.items()
    ]
    # Up is a smaller y; e is the teacher.
    assert [m.title for m in pareto._front(marks)] == ["a", "c"]


@pytest.mark.parametrize(
    "values, chosen",
    [
        (["linear_top1_best_on_val", "linear_top1_selected"], "linear_top1_selected"),
        (["ridge_top1_selected", "linear_top1_preset_last"], "linear_top1_preset_last"),
        (["ridge_top1_best_on_val", "logistic_top1_selected"], "logistic_top1_selected"),
        (["knn_top1"], ""),
    ],
)
def test_the_accuracy_that_is_reported_first(values, chosen):
    points = [Point("a", 0, "torch", False, dict.fromkeys(values, 1.0), {})]
    assert pareto._most(points, pareto._linear) == chosen


def test_what_most_networks_have_goes_before_what_is_reported_first():
    every, one = {"ridge_top1_selected": 1.0}, {"linear_top1_selected": 1.0}
    points = [Point(n, 0, "torch", False, every | more, {}) for n, more in (("a", one), ("b", {}))]
    assert pareto._most(points, pareto._linear) == "ridge_top1_selected"


def test_size_and_macs_are_counted_where_no_bench_was(root):
    folder = reports.run(root, "counted")
    reports.evaluated(folder, 0.5)
    runs = read(folder)
    (net,) = networks.read(runs)
    knn = pareto.groups(runs, [net])[0]
    size, macs = networks.cost(net.net, 32)
    assert knn.json()[0]["mb"] == size / 1e6 and knn.json()[0]["mmacs"] == macs / 1e6
    assert [bool(p.lacking) for p in knn.panels] == [True, False, False]
    linear = models.of(config.load(folder / "config.yaml"))
    assert size >= 4 * models.size(linear.backbone)


def test_macs_of_a_layer():
    net = torch.nn.Module()
    net.backbone = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    size, macs = networks.cost(net, 10)
    assert size == 4 * 3 * 8 * 9 and macs == 10 * 10 * 3 * 8 * 9


def test_a_rejected_file_is_drawn_as_one(root):
    folder = reports.run(root, "rejected", weights=False)
    reports.exported(folder, passed=False)
    runs = read(folder)
    points = {p.form: p for p in pareto.groups(runs, networks.read(runs, weights=False))[0].points}
    assert points["int8"].rejected and not points["onnx"].rejected
    assert "torch" not in points


# ---- networks


def test_the_teacher_comes_first_also_where_it_is_a_run(root):
    teacher = reports.run(root, "big", 5)
    disco = reports.run(root, "small", 6, teacher__file=teacher)
    for folders, names in (
        ((disco,), ["teacher big", "small"]),
        ((disco, teacher), ["big", "small"]),
    ):
        found = networks.read(read(*folders))
        assert [n.name for n in found] == names
        assert [n.role for n in found] == [TEACHER, DISTILLED] and found[0].net is not None


def test_the_ema_stands_beside_its_run(root):
    folder = reports.run(root, "averaged", weights=False)
    reports.evaluated(folder, 0.5)
    (folder / "eval").rename(folder / "ema")
    (folder / "eval").mkdir()
    (folder / "ema").rename(folder / "eval/ema")
    found = networks.read(read(folder), weights=False)
    assert [n.name for n in found] == ["averaged", "averaged, EMA"]
    assert found[1].measured.results[0].values == {"knn_top1": 0.5} and found[1].role == ALONE


def test_relative_paths_are_of_where_the_training_ran(root, monkeypatch):
    folder = reports.run(root, "relative", weights=False, run__out="out", data__val="val")
    (run,) = read(folder)
    monkeypatch.chdir("/")
    assert run.at(run.cfg.data.val) == root / "val"
    assert run.at(root / "x") == root / "x"
    assert str(run.at(Url("s3://bucket/x"))) == "s3://bucket/x"


def test_only_the_last_weights_count(root):
    folder, other = (reports.run(root, n, weights=False) for n in ("later", "earlier"))
    reports.evaluated(other, 0.1)
    (other / "eval").rename(folder / "eval")
    old = next((folder / "eval").glob("knn-*.json"))
    os.utime(old, (1, 1))
    reports.evaluated(folder, 0.6)
    (run,) = read(folder)
    assert [r.values["knn_top1"] for r in run.measured.results] == [0.6]
    assert "1 evaluations of earlier weights are left out" in run.remarks


# ---- views


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [1, 5, 13])
def test_views_are_those_that_the_step_saw(root, step, accumulate):
    cfg = config.load(
        reports.ROOT / "tests/tiny.yaml",
        [f"data.train={root}/train", f"data.accumulate={accumulate}", "run.seed=3"],
    )
    listing = data.listing(cfg.data.train)
    cpu = torch.device("cpu")
    micro = config.micro_batch(cfg, 1)
    loader = data.TrainLoader(
        listing, config.crops(cfg), micro, 3, cfg.run.epochs, accumulate, 1, cpu
    )
    # As training goes on from a checkpoint.
    loader.position = (step - 1) * accumulate
    want = next(loader)
    epoch, found, _ = augmented.of_step(cfg, listing, step, 3)
    assert epoch == (step - 1) // 6 == found.epoch
    assert torch.equal(found.index, want.index[:3])
    for a, b in zip(found.views, want.views):
        assert torch.equal(a, b[:3])


def test_images_that_broke_are_replaced_as_in_the_training(root):
    folder = reports.run(root, "replaced", run__seed=3)
    cfg, listing = config.load(folder / "config.yaml"), data.listing(root / "train")
    whole = augmented.of_step(cfg, listing, 1, 3).batch.index.tolist()
    state = folder / "checkpoints/step_00000020/state.pt"
    saved = torch.load(state) | {"data": {"position": 20, "aside": {whole[1]: "cut short"}}}
    torch.save(saved, state)
    (run,) = read(folder)
    assert networks.aside(run) == {whole[1]: "cut short"}
    found = augmented.of_step(cfg, listing, 1, 3, networks.aside(run)).batch.index.tolist()
    assert found[0] == whole[0] and found[2] == whole[2] and found[1] != whole[1]
    text = page.html([run], page.Wanted(images=0), neighbours.Kept())
    assert "No image is quarantined; 1 more broke during the training." in text


def test_a_quarantine_that_is_not_looked_at_is_not_called_empty(root):
    gone = reports.run(root, "elsewhere", weights=False, data__train="/nowhere/train")
    far = reports.run(root, "bucket", weights=False, data__train="s3://bucket/train")
    text = page.html(read(gone, far), page.Wanted(images=0), neighbours.Kept())
    assert "with them its quarantine, are not here" in text
    assert "object storage, whose quarantine is not looked at" in text
    assert "No image is quarantined" not in text


def test_a_picture_for_each_run_or_why_there_is_none(root):
    a, b = (reports.run(root, n, weights=False) for n in ("seen", "seen_too"))
    other = reports.run(root, "unseen", weights=False, run__seed=1)
    gone = reports.run(root, "lost", weights=False, data__train="/nowhere")
    reports.trained(a, steps=3, of=3)
    reports.trained(b, steps=3, of=3)
    found = augmented.draw(read(a, b, other, gone), 3)
    assert found[0].text.startswith("step 3, in epoch 1: 4 of its 8 images")
    side, gap = augmented.SIDE, augmented.GAP
    assert (found[0].width, found[0].height) == (3 * (side + gap) - gap, 4 * (side + gap) - gap)
    assert found[1].text == "saw the same images with the same views as seen."
    assert found[2].uri and found[2].images != found[0].images
    assert "its views cannot be drawn: /nowhere: no such folder" in found[3].text
    assert augmented.draw(read(a), 4)[0].text == "has no step 4: it ends after 3."


# ---- neighbours


def listing_of(labels):
    names = ["a", "b", "c"]
    files = [f"{names[y]}/{i}.png" for i, y in enumerate(labels)]
    return data.Listing(reports.ROOT, reports.ROOT, files, np.asarray(labels), names)


def features(angles, labels):
    x = torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles])
    return Features(x, torch.tensor(labels), torch.arange(len(labels)))


def network(name, role, found=()):
    return Network(name, role, None, collect.Measured(list(found)))


def test_nearest_others():
    x = features([0, 10, 25, 90], [0, 0, 1, 1]).x
    assert neighbours._others(x, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    # A copy stands before the image itself, which still is not among its own nearest.
    twins = neighbours._others(torch.cat([x[:1], x[:1], x[1:2]]), 1)
    assert twins.flatten().tolist() == [1, 0, 0]


def test_they_disagree_most_where_they_share_least():
    shared = torch.tensor([3, 0, 0, 0, 1, 1])
    label = torch.tensor([0, 0, 0, 1, 2, 0])
    # Of those that share nothing, one of each class first.
    assert neighbours._worst(shared, label) == [1, 3, 2, 4]


def test_strips_and_gap():
    labels = [0, 0, 0, 1, 1, 1]
    shown = [network("big", TEACHER), network("single", ALONE), network("small", DISTILLED)]
    apart = features([0, 4, 9, 90, 95, 101], labels)
    mixed = features([0, 91, 9, 90, 8, 101], labels)
    sheet = sheets.Sheet()
    found = neighbours._strips(shown, [apart, mixed, apart], listing_of(labels), sheet)
    assert [q.label for q in found.usual] == ["a", "b"]
    first = found.usual[0]
    assert [r.network for r in first.rows] == ["big", "single", "small"]
    assert (
        first.rows[0].images[:2] == ["a/1.png", "a/2.png"] and first.rows[0].same[:2] == [True] * 2
    )
    assert first.rows[0].shared is None and first.rows[2].shared == len(first.rows[2].tiles) == 5
    assert "small and big share 5.0 of an image's 5 nearest on average." in found.text
    assert found.gap.networks == ["big", "single", "small"]
    by_class = dict(found.gap.rows)
    assert all(shares[0] == shares[2] for shares in by_class.values())
    assert len(sheet) == 6


def test_the_class_furthest_behind_comes_first():
    labels = [0] * 4 + [1] * 4 + [2] * 4
    teacher = features([0, 1, 2, 3, 90, 91, 92, 93, 180, 181, 182, 183], labels)
    # Two images of class b lie among class c.
    student = features([0, 1, 2, 3, 90, 182.4, 181.6, 93, 180, 181, 182, 183], labels)
    shown = [network("big", TEACHER), network("small", DISTILLED)]
    gap, why = neighbours._gap(shown, [teacher, student], listing_of(labels))
    assert not why
    assert gap.rows[0] == ("b", [1.0, 0.5])
    assert neighbours._gap(shown[1:], [student], listing_of(labels))[0] is None
    alike = teacher._replace(label=teacher.label * 0)
    assert "no classes" in neighbours._gap(shown, [alike] * 2, listing_of(labels))[1]


def evaluated(name, role, votes, labels, k=20, fingerprint="a"):
    """A network that `fastdisco eval knn` has measured."""
    votes, labels = np.asarray(votes), np.asarray(labels)
    protocol = {"network": {"fingerprint": fingerprint}, "knn": {"k": k}}
    values = {"knn_top1": float((votes == labels).mean())}
    result = results.make("knn", values, protocol, 1.0, {"knn_top1": votes}, labels)
    return network(name, role, [result])


def test_classes_are_compared_on_all_validation_images_where_all_networks_were_evaluated():
    labels = [0] * 2 + [1] * 2
    alike = [features([0, 1, 90, 91], labels)] * 2
    # Of eight validation images the student misses three of class b, which the four here cannot say.
    whole = [0] * 4 + [1] * 4
    big = evaluated("big", TEACHER, whole, whole)
    small = evaluated("small", DISTILLED, [0] * 4 + [1, 0, 0, 0], whole, fingerprint="b")
    gap, _ = neighbours._gap([big, small], alike, listing_of(labels))
    assert gap.rows == [("b", [1.0, 0.25]), ("a", [1.0, 1.0])]
    assert "all 8 validation images" in gap.text
    # Another protocol, or a network without an evaluation: only the images that are shown.
    other = evaluated("small", DISTILLED, [0] * 8, whole, k=200)
    for student in (other, network("small", DISTILLED)):
        gap, _ = neighbours._gap([big, student], alike, listing_of(labels))
        assert dict(gap.rows) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
        assert "one image of a class is up to 50.0" in gap.text


def test_features_are_kept_until_the_weights_change(root):
    folder = reports.run(root, "kept", 1)
    runs, kept = read(folder), neighbours.Kept()
    before = neighbours.strips(runs, networks.read(runs), 5, sheets.Sheet(), kept)
    assert len(kept._features) == 1
    assert neighbours.strips(runs, networks.read(runs), 5, sheets.Sheet(), kept) == before
    assert len(kept._features) == 1
    state = folder / "checkpoints/step_00000020/state.pt"
    os.utime(state, (1, 1))
    neighbours.strips(runs, networks.read(runs), 5, sheets.Sheet(), kept)
    assert len(kept._features) == 2
    assert before.usual[0].image.startswith("class0/") and "15 validation images" in before.text


# ---- maps


def test_maps_of_single_runs_are_put_together(root):
    folders = [reports.run(root, n, weights=False) for n in ("m0", "m1")]
    first = reports.mapped(folders[0], ["m0"], seed=1, at=5)
    path = reports.mapped(folders[1], ["m1"], seed=2)
    # The same map, turned by a quarter.
    content, turned = json.loads(path.read_text()), json.loads(first.read_text())
    points = turned["networks"][0]["coordinates"]
    content["networks"][0]["coordinates"] = [[-y, x] for x, y in points]
    path.write_text(json.dumps(content))
    os.utime(path, (1, 1))
    found = maps.read(read(*folders), sheets.Sheet())
    assert [m.name for m in found.maps] == ["m0", "m1"]
    assert np.allclose(found.maps[0].points, found.maps[1].points, atol=0.11)
    content["protocol"]["tsne"] = {"seed": 7}
    path.write_text(json.dumps(content))
    os.utime(path, (1, 1))
    assert [m.name for m in maps.read(read(*folders), sheets.Sheet()).maps] == ["m0"]


def test_the_file_with_most_networks_is_shown(root):
    folder = reports.run(root, "most", weights=False)
    reports.mapped(folder, ["x", "y", "z"], seed=1, at=0)
    reports.mapped(folder, ["w"], seed=2, at=9)
    sheet = sheets.Sheet()
    found = maps.read(read(folder), sheet)
    assert [m.name for m in found.maps] == ["x", "y", "z"]
    assert len(found.images) == 36 == len(sheet) and found.images[0]["tile"] == 0
    assert found.maps[0].said == "neighbours kept 25.0%, trustworthiness 0.900"
    assert len({*found.colours}) == 3


def test_of_many_images_some_are_shown(root, monkeypatch):
    folder = reports.run(root, "many", weights=False)
    reports.mapped(folder, ["x", "y"])
    monkeypatch.setattr(maps, "MOST", 10)
    found = maps.read(read(folder), sheets.Sheet())
    assert found.text == "9 of 36 validation images, one in 4."
    assert (
        len(found.images) == len(found.maps[1].points) == len(found.maps[1].raw["coordinates"]) == 9
    )


def test_without_the_images_a_map_has_no_thumbnails(root, tmp_path):
    folder = reports.run(root, "bare", weights=False)
    reports.mapped(folder, ["x", "y"])
    runs = report.read([folder], ["data.val=/nowhere"])
    found = maps.read(runs, sheets.Sheet())
    assert "There are no thumbnails: /nowhere: no such folder" in found.text
    assert {i["tile"] for i in found.images} == {None} and len(found.maps) == 2


def test_an_image_that_cannot_be_read_is_grey(root, tmp_path):
    listing = listing_of([0])
    picture = sheets.square(listing, 0, 8)
    assert picture.getcolors() == [(64, (128, 128, 128))]
