"""`fastdisco eval tsne`: which images, the alignment of maps, how they are judged, and what is written."""

import importlib.util
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from conftest import ranks
from PIL import Image
from scipy.spatial import procrustes
from sklearn.manifold import trustworthiness
from test_eval_command import a_run, evaluate

from fastdisco import cli, data
from fastdisco.commands import arguments
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.evals import results, scatter, tsne
from fastdisco.evals import settings as all_settings
from fastdisco.evals.settings import Tsne


def listing(counts, left_out=()):
    """Images of classes c00, c01 ..., `counts` of each."""
    labels = np.concatenate([np.full(n, c, np.int64) for c, n in enumerate(counts)])
    files = [f"c{c:02}/{i:03}.png" for i, c in enumerate(labels)]
    names = [f"c{c:02}" for c in range(len(counts))]
    more = {"left_out": np.array(left_out, np.int64)}
    return data.Listing("val", "val", files, labels, names, **more)


# ---- which images


def test_the_papers_classes_are_5_to_14_and_their_first_50_images():
    images = listing([60] * 20, left_out=[300, 305])
    found = tsne.choose(images, Tsne())
    assert found.classes == list(range(5, 15)) and found.remarks == []
    assert len(found.indices) == 500
    # Class 5 begins at 300, and two of its images are in the quarantine.
    want = [i for i in range(300, 352) if i not in (300, 305)]
    assert found.indices[:50].tolist() == want
    assert found.indices[50:100].tolist() == list(range(360, 410))


def test_fewer_classes_and_images_are_adjusted_to_and_said():
    found = tsne.choose(listing([60] * 12), Tsne())
    assert found.classes == list(range(10))
    assert found.remarks == [
        "tsne: val has 12 classes, so the first 10 stand for the paper's, which are at the positions 5 to 14"
    ]
    few, short, perplexity = tsne.choose(listing([20, 9]), Tsne()).remarks
    assert "has 2 classes, so the first 2" in few
    assert "2 of the 2 classes have fewer than 50 images (the fewest: 9)" in short
    assert "perplexity 9 in place of 30, a third of the 29 images" in perplexity
    (said, _) = tsne.choose(listing([70]), Tsne(images=6)).remarks
    assert "one class, so the map shows its first 60 images" in said


def test_classes_by_name_by_position_and_drawn():
    images = listing([30] * 20)
    assert tsne.choose(images, Tsne(classes=("c07", 3, 7))).classes == [3, 7]
    drawn = [tsne.choose(images, Tsne(drawn=10, seed=s)).classes for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10 and set(drawn[0]) <= set(range(20))


@pytest.mark.parametrize(
    "counts, asked, why",
    [
        ([30] * 3, {"classes": (3,)}, "3 is no class of val, which has c00, c01, c02; give names"),
        ([30] * 3, {"classes": ("dog",)}, "tsne.classes: dog is no class of val"),
        ([30, 0, 30], {"classes": (1,)}, "1 is no class of val"),
        ([30] * 3, {"drawn": 4}, "4 classes are more than the 3 of val"),
        ([10, 10], {}, "20 images are too few for the 10 neighbours"),
        ([20, 20], {"perplexity": 40.0}, "40 is not below the 40 images"),
        ([20, 20], {"method": "umap", "neighbours": 40}, "tsne.neighbours: 40 is not below the 40"),
        ([60], {"classes": (0,)}, "are of one class, so none can be chosen"),
    ],
)
def test_what_cannot_be_shown_is_refused(counts, asked, why):
    with pytest.raises(UserError, match=why):
        tsne.choose(listing(counts), Tsne(**asked))


def test_two_ways_to_choose_are_refused():
    with pytest.raises(UserError, match="two ways to choose; give one"):
        all_settings.load(["tsne.classes=[1, 2]", "tsne.drawn=2"])


# ---- alignment


def turned(y, angle, flip=False, scale=1.0, move=(0.0, 0.0)):
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    if flip:
        turn = turn @ np.diag([1.0, -1.0])
    return scale * y @ turn + np.array(move)


@pytest.mark.parametrize("angle", [0.0, 0.4, np.pi / 2, 3.0])
@pytest.mark.parametrize("flip", [False, True])
def test_copies_that_are_turned_mirrored_scaled_and_moved_come_back(angle, flip):
    y = np.random.default_rng(0).normal(size=(40, 2)) * [3, 1] + [5, -2]
    copy = turned(y, angle, flip, scale=0.01, move=(100, 7))
    found, disparity = tsne.aligned(copy, y)
    np.testing.assert_allclose(found, y, atol=1e-9)
    assert disparity == pytest.approx(0, abs=1e-12)


def test_no_other_rotation_or_reflection_of_that_size_is_nearer():
    rng = np.random.default_rng(1)
    y = rng.normal(size=(30, 2)) * [2, 1]
    other = turned(y, 1.0, flip=True, scale=4.0) + rng.normal(size=(30, 2))
    found, disparity = tsne.aligned(other, y)
    size = lambda t: np.square(t - t.mean(0)).sum()
    assert size(found) == pytest.approx(size(y))
    error = np.square(found - y).sum()
    same = (other - other.mean(0)) * np.sqrt(size(y) / size(other))
    tried = [turned(same, a, f) for a in np.linspace(0, 2 * np.pi, 90) for f in (False, True)]
    assert all(np.square(t + y.mean(0) - y).sum() >= error for t in tried)
    # Distances keep their ratios: it moves as one body.
    lengths = [np.linalg.norm(t[1:] - t[:-1], axis=1) for t in (found, other)]
    assert np.ptp(lengths[0] / lengths[1]) < 1e-9
    # What the best scale, too, would leave, as scipy finds it.
    assert disparity == pytest.approx(procrustes(y, other)[2])
    assert disparity == pytest.approx(tsne.aligned(y, other)[1])
    assert np.square(tsne.standard(other)).sum(1).mean() == pytest.approx(1)


# ---- how a map is judged


def test_the_judgement_is_that_of_scikit_learn_and_of_a_direct_count():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)).astype(np.float32)
    y = x[:, :2] + 0.1 * rng.normal(size=(300, 2))
    found = tsne.run(x, y, 7)
    assert found["tsne_trustworthiness"] == pytest.approx(trustworthiness(x, y, n_neighbors=7))
    near = []
    for t in (x, y):
        d = np.linalg.norm(t[:, None].astype(float) - t[None], axis=2)
        np.fill_diagonal(d, np.inf)
        near.append(d.argsort(1)[:, :7])
    shares = [len({*a} & {*b}) / 7 for a, b in zip(*near)]
    assert found["tsne_knn_preservation"] == pytest.approx(np.mean(shares))


def test_a_perfect_map_and_one_by_chance():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(400, 2))
    x = (y @ rng.normal(size=(2, 2)) * 0 + turned(y, 0.7, True, 3.0)).astype(np.float32)
    assert tsne.run(x, y) == {"tsne_knn_preservation": 1, "tsne_trustworthiness": 1}
    chance = tsne.run(rng.normal(size=(400, 5)).astype(np.float32), y)
    assert chance["tsne_knn_preservation"] == pytest.approx(10 / 399, abs=0.02)
    assert chance["tsne_trustworthiness"] == pytest.approx(0.5, abs=0.05)


def clusters(n=90):
    """Three clusters of n / 3 points in 20 dimensions, and their labels."""
    rng = np.random.default_rng(0)
    label = np.arange(n) % 3
    return (8 * np.eye(3, 20)[label] + rng.normal(size=(n, 20))).astype(np.float32), label


def optional(module):
    """Marks for a package that may not be installed, and whose import compiles for long."""
    gone = importlib.util.find_spec(module) is None
    return [pytest.mark.slow, pytest.mark.skipif(gone, reason=f"extra: {module} is not installed")]


@pytest.mark.parametrize(
    "method",
    [
        "tsne",
        pytest.param("opentsne", marks=optional("openTSNE")),
        pytest.param("umap", marks=optional("umap")),
    ],
)
def test_a_map_keeps_clusters_apart_and_is_the_same_each_time(method):
    x, label = clusters()
    s = Tsne(method=method)
    y = tsne.fit(x, s)
    assert y.shape == (90, 2) and y.dtype == np.float64
    d = np.linalg.norm(y[:, None] - y[None], axis=2)
    np.fill_diagonal(d, np.inf)
    assert (label[d.argmin(1)] == label).all()
    assert np.array_equal(tsne.fit(x, s), y)
    assert tsne.version(method)


def test_what_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="umap needs umap-learn, which is not installed; pip inst"):
        tsne.refuse_absent("umap")
    with pytest.raises(UserError, match="opentsne needs openTSNE"):
        tsne.refuse_absent("opentsne")


# ---- the picture


def test_colours_are_different_for_any_number_of_classes():
    for n in (1, 10, 11, 20, 21, 100):
        found = scatter.colours(n)
        assert len(found) == len(set(found)) == n and all(len(c) == 7 for c in found)


def test_a_picture_has_names_as_they_are_and_the_same_bytes_each_time(tmp_path, monkeypatch):
    y = np.random.default_rng(0).normal(size=(30, 2))
    values = {"tsne_knn_preservation": 0.4321, "tsne_trustworthiness": 0.9}
    maps = [tsne.Map(n, {}, y, values, 0.0) for n in ("cost $5 and $6", "b\udcff")]
    label, names = np.arange(30) % 2, {0: "a $x^$ class", 1: "_hidden"}
    written = []
    for name in ("one", "two"):
        scatter.draw(tmp_path / name, maps, label, names, scatter.colours(2))
        written.append([(tmp_path / f"{name}.{s}").read_bytes() for s in ("png", "svg")])
    assert written[0] == written[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "one.png",
        "one.svg",
        "two.png",
        "two.svg",
    ]
    assert b"<dc:date>" not in written[0][1]
    # A comment in the SVG has each text as it was written.
    text = written[0][1].decode()
    for said in ("cost $5 and $6", "a $x^$ class", "_hidden", "neighbours kept 43.2%"):
        assert said in text, said


# ---- the command


@pytest.fixture(scope="module")
def two(textures, tmp_path_factory):
    """Two runs."""
    out = tmp_path_factory.mktemp("runs")
    return [a_run(textures, out, seed) for seed in (0, 1)]


def test_two_networks_side_by_side(two, textures, capsys, tmp_path):
    values, said = evaluate(capsys, "tsne", *two, "tsne.titles=[Alone]")
    # No number stands in the place of another network's.
    keys = ("tsne_knn_preservation", "tsne_trustworthiness")
    assert values.keys() == {f"eval/{name}/{key}" for name in ("Alone", "run1") for key in keys}
    assert "\nAlone: tsne (" in said and "\nrun1: tsne (" in said
    assert "has 3 classes, so the first 3" in said and "perplexity 9 in place of 30" in said
    (path,) = (two[0] / "eval").glob("*.coordinates.json")
    found = json.loads(path.read_text())
    # Of each network a result in its own folder, which the table can show.
    own = [results.read_all(r / "eval")[0] for r in two]
    assert [r.values[keys[0]] for r in own] == [
        values[f"eval/{name}/{keys[0]}"] for name in ("Alone", "run1")
    ]
    assert [n["values"] for n in found["networks"]] == [r.values for r in own]
    assert [n["name"] for n in found["networks"]] == ["Alone", "run1"]
    assert own[0].hash != own[1].hash
    assert found["hash"] == results.short_hash(found["protocol"])
    assert path.name == f"tsne-{found['hash']}.coordinates.json"
    assert not list((two[1] / "eval").glob("*.coordinates.json"))
    # Names relative to the data, labels, classes with their colours.
    val = data.listing(textures / "val")
    assert [i["name"] for i in found["images"]] == val.files
    assert [i["label"] for i in found["images"]] == val.labels.tolist()
    assert [c["name"] for c in found["classes"]] == ["class0", "class1", "class2"]
    assert [c["colour"] for c in found["classes"]] == scatter.colours(3)
    # Aligned: no turn brings the second any nearer.
    first, second = (np.array(n["coordinates"]) for n in found["networks"])
    again, disparity = tsne.aligned(second, first)
    np.testing.assert_allclose(again, second, atol=1e-4)
    assert disparity == pytest.approx(found["networks"][1]["disparity"], abs=1e-4) and disparity > 0
    with Image.open(path.with_name(f"tsne-{found['hash']}.png")) as image:
        assert image.size[0] > 1.5 * image.size[1]
    svg = path.with_name(f"tsne-{found['hash']}.svg")
    assert ET.parse(svg).getroot().tag.endswith("svg")
    assert "Alone" in svg.read_text() and "class2" in svg.read_text()


def test_the_same_command_writes_the_same_bytes(two, capsys, tmp_path):
    def content(name):
        evaluate(capsys, "tsne", *two, f"--out={tmp_path}/{name}")
        files = sorted((tmp_path / name).iterdir())
        kinds = (".png", ".svg", ".coordinates.json")
        return {p.name: p.read_bytes() for p in files if p.name.endswith(kinds)}

    one, other = content("one"), content("two")
    assert len(one) == 3 and one == other


def test_networks_of_one_name_are_told_apart_by_their_paths(two, capsys, tmp_path):
    values, _ = evaluate(
        capsys, "tsne", two[0], two[0], f"--out={tmp_path}/a", "tsne.titles=[run0]"
    )
    (name,) = {k.removeprefix("eval/").rpartition("/")[0] for k in values}
    assert name == str(two[0])
    ema = two[0] / "checkpoints/step_00000001"
    values, _ = evaluate(capsys, "tsne", two[0], ema, f"--out={tmp_path}/b")
    assert "eval/run0/tsne_trustworthiness" in values and len(values) == 4


def test_more_titles_than_networks_are_refused(two, capsys):
    said = evaluate(capsys, "tsne", two[0], "tsne.titles=[a, b]", code=2)[1]
    assert "2 titles for 1 networks; give one for each" in said


def test_another_seed_is_another_protocol_and_leaves_the_first(two, capsys, tmp_path):
    for seed in (0, 1):
        evaluate(capsys, "tsne", two[0], f"--out={tmp_path}", f"tsne.seed={seed}")
    found = results.read_all(tmp_path)
    assert [r.protocol["tsne"]["seed"] for r in found] in ([0, 1], [1, 0])
    # Of one network, picture and coordinates have the hash of its result.
    for r in found:
        assert {p.name.partition(".")[2] for p in tmp_path.glob(f"tsne-{r.hash}.*")} == {
            "json",
            "png",
            "svg",
            "coordinates.json",
        }
        assert r.protocol["data"]["val"]["images"] == 30
        assert "scikit-learn" in r.protocol["versions"]


def test_a_run_beside_a_network_of_timm_sees_the_runs_images(two, capsys, tmp_path):
    evaluate(
        capsys, "tsne", "timm:resnet18", two[0], "--untrained", f"--out={tmp_path}/out", "tsne.k=5"
    )
    (path,) = (tmp_path / "out").glob("*.coordinates.json")
    found = json.loads(path.read_text())
    assert [n["name"] for n in found["networks"]] == ["resnet18, untrained", "run0"]
    assert found["protocol"]["view"]["size"] == 32 and len(found["images"]) == 30
    assert found["networks"][0]["disparity"] == 0


def on_a_rank(runs, out):
    dist.defaults()
    return cli.main(["eval", "tsne", *map(str, runs), f"--out={out}"])


def test_two_ranks_write_what_one_writes(two, capsys, tmp_path):
    assert evaluate(capsys, "tsne", *two, f"--out={tmp_path}/one")
    assert ranks(2, on_a_rank, two, tmp_path / "two") == [0, 0]
    one, other = ({p.name: p for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one.keys() == other.keys()
    a, b = (results.read_all(tmp_path / n) for n in ("one", "two"))
    for r, q in zip(a, b):
        assert r.hash == q.hash and r.values == pytest.approx(q.values)


def test_networks_and_overrides_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.lr=3").mkdir()
    words = ["out/a", "tsne.k=5", "timm:resnet18", "out.lr=3", "out/lr=3", "data.val=a b"]
    assert arguments.parted(words) == (
        ["out/a", "timm:resnet18", "out.lr=3", "out/lr=3"],
        ["tsne.k=5", "data.val=a b"],
    )
