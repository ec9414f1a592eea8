"""Intervals, splits of the training set, and results with their tables."""

import json
from math import comb

import numpy as np
import pytest
from scipy.stats import binom

from fastdisco.common.errors import UserError
from fastdisco.data import Listing
from fastdisco.evals import intervals, results, splits


def right(n, share, seed):
    return np.random.default_rng(seed).random(n) < share


def test_the_bootstrap_is_that_of_drawing_images():
    r = right(500, 0.7, 0)
    rng = np.random.default_rng(1)
    drawn = [r[rng.integers(500, size=500)].mean() for _ in range(10_000)]
    low, high = intervals.bootstrap(r)
    # Quantiles of 10,000 draws have themselves an error of about 0.0005.
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.003)
    exact = binom.ppf([0.025, 0.975], 500, r.mean()) / 500
    assert (low, high) == pytest.approx(tuple(exact), abs=0.003)
    assert intervals.bootstrap(np.ones(50, bool)) == (1, 1)


def test_the_paired_difference_is_that_of_drawing_pairs():
    a, b = right(400, 0.75, 2), right(400, 0.7, 3)
    rng = np.random.default_rng(4)
    rows = rng.integers(400, size=(10_000, 400))
    drawn = a[rows].mean(1) - b[rows].mean(1)
    got = intervals.paired(a, b)
    assert got.difference == pytest.approx(a.mean() - b.mean())
    assert got.interval == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.004)
    assert got.only_first == (a & ~b).sum() and got.only_second == (b & ~a).sum()
    # Much narrower than two intervals of their own where the two agree on most images.
    c = a.copy()
    c[:4] = ~c[:4]
    low, high = intervals.paired(a, c).interval
    assert high - low < 0.03 < np.subtract(*intervals.bootstrap(a)[::-1])


@pytest.mark.parametrize("a, b", [(0, 0), (3, 9), (9, 3), (5, 5), (0, 7)])
def test_mcnemar_is_the_binomial_test_written_out(a, b):
    n = a + b
    tail = sum(comb(n, i) for i in range(min(a, b) + 1)) / 2**n
    assert intervals.mcnemar(a, b) == pytest.approx(min(1, 2 * tail))


def listing(tmp_path, classes=10, each=30):
    files = [f"n{c:02}/n{c:02}_{i}.JPEG" for c in range(classes) for i in range(each)]
    labels = np.repeat(np.arange(classes), each)
    return Listing(tmp_path, tmp_path, files, labels, [f"n{c:02}" for c in range(classes)])


def test_a_published_list_is_read_as_it_is(tmp_path, capsys):
    data = listing(tmp_path)
    path = tmp_path / "some.txt"
    path.write_text("n03_7.JPEG\nn00_0.JPEG\nn09_29.JPEG\n")
    assert splits.published(path, data).tolist() == [0, 97, 299]  # the first line is no header
    left = data._replace(left_out=np.array([97]))
    assert splits.published(path, left).tolist() == [0, 299]
    assert "1 of its images are left out" in capsys.readouterr().out


def test_a_list_of_a_published_name_with_another_count_is_said(tmp_path, capsys):
    path = tmp_path / "1percent.txt"
    path.write_text("n03_7.JPEG\n")
    assert len(splits.published(path, listing(tmp_path))) == 1
    assert "has 1 names, the published list 12811" in capsys.readouterr().out
    assert splits.PUBLISHED == {"1percent.txt": 12811, "10percent.txt": 128116}


def test_lists_that_do_not_fit_are_refused(tmp_path):
    data, path = listing(tmp_path), tmp_path / "x.txt"
    for text, says in [
        ("file,class\nn03_7.JPEG\n", "names 1 images that .* does not have: file,class"),
        ("n03_7.JPEG\nn03_7.JPEG\n", "names 1 images twice"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            splits.published(path, data)
    path.write_text("n00_1.JPEG\n")
    twin = data._replace(files=[*data.files[:-1], "n01/n00_1.JPEG"])
    with pytest.raises(UserError, match="in several folders"):
        splits.published(path, twin)
    with pytest.raises(UserError, match="cannot be read"):
        splits.published(tmp_path / "none", data)


def test_a_drawn_part_has_the_same_share_of_every_class():
    labels = np.repeat(np.arange(10), 130)
    whole = np.arange(1300)
    a = splits.drawn(labels, whole, 0.1, 0)
    assert np.bincount(labels[a]).tolist() == [13] * 10 and len(set(a)) == 130
    assert (np.diff(a) > 0).all()
    assert np.array_equal(a, splits.drawn(labels, whole, 0.1, 0))
    b = splits.drawn(labels, whole, 0.1, 1)
    assert len(set(a) & set(b)) < 60
    # 1 % of 130 is 1.3 of each: 13 in all, every class at least once.
    c = np.bincount(labels[splits.drawn(labels, whole, 0.01, 0)])
    assert c.sum() == 13 and c.min() == 1 and c.max() == 2
    # Not every time the same classes get the rest.
    d = [tuple(np.bincount(labels[splits.drawn(labels, whole, 0.01, s)])) for s in range(5)]
    assert len(set(d)) > 1
    uneven = np.repeat([0, 1, 2], [1000, 290, 10])
    e = np.bincount(uneven[splits.drawn(uneven, np.arange(1300), 0.01, 0)])
    assert e.tolist() == [10, 2, 1]  # of 10 + 2.9 + 0.1, where each class is to be there


def test_an_image_is_drawn_or_not_whatever_else_is_there():
    labels = np.repeat(np.arange(4), 100)
    whole = set(splits.drawn(labels, np.arange(400), 0.2, 3))
    rest = np.arange(100, 400)
    assert set(splits.drawn(labels, rest, 0.2, 3)) == {i for i in whole if i >= 100}


def test_images_held_out_are_no_training_images():
    labels = np.repeat(np.arange(10), 130)
    train, held = splits.held_out(labels, np.arange(1300), 0.01, 0)
    assert len(held) == 13 and len(train) == 1287 and not set(train) & set(held)
    assert sorted([*train, *held]) == list(range(1300))
    # Of 20 images of 20 classes 1 % is none.
    with pytest.raises(UserError, match="1% of 20 training images is none"):
        splits.held_out(np.arange(20), np.arange(20), 0.01, 0)


def result(network="a", k=20, acc=0.75, seed=0, versions="2.14", n=200):
    labels = np.random.default_rng(9).integers(5, size=n)
    wrong = ~right(n, acc, seed)
    protocol = {
        "network": {"fingerprint": network},
        "data": {"val": "v"},
        "knn": {"k": k, "temps": [0.07]},
        "versions": {"torch": versions},
    }
    found = (labels + wrong) % 5
    values = {"knn_top1_k20": float((found == labels).mean()), "other": 1.5}
    return results.make("knn", values, protocol, 1.25, {"knn_top1_k20": found}, labels)


def test_a_result_is_read_back_as_it_was(tmp_path):
    r = result()
    path = results.write(tmp_path, r)
    assert path.name == f"knn-{r.hash}.json"
    back = results.read(path)
    assert back.values == r.values and back.protocol == r.protocol and back.seconds == 1.25
    assert np.array_equal(back.labels, r.labels) and back.intervals == r.intervals
    assert np.array_equal(back.predictions["knn_top1_k20"], r.predictions["knn_top1_k20"])
    low, high = r.intervals["knn_top1_k20"]
    assert low < r.values["knn_top1_k20"] < high and "other" not in r.intervals


def test_another_protocol_never_overwrites(tmp_path):
    one, other, again = result(), result(k=10), result(acc=0.6)
    paths = {results.write(tmp_path, r) for r in (one, other, again)}
    assert len(paths) == 2 and len(results.read_all(tmp_path)) == 2
    # The same protocol again is the same result, written anew.
    assert results.read(results.write(tmp_path, again)).values == again.values
    assert one.hash != other.hash and one.hash == again.hash


def test_a_changed_or_foreign_file_is_refused(tmp_path):
    path = results.write(tmp_path, result())
    found = json.loads(path.read_text())
    found["protocol"]["knn"]["k"] = 200
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match="its hash is not that of its protocol"):
        results.read(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="is no result of an evaluation"):
        results.read(path)
    with pytest.raises(UserError, match="holds no results"):
        results.read_all(tmp_path / "none")


def test_the_table_in_three_forms():
    t = results.table({"a": [result()], "b": [result("b", acc=0.6)]}, ["knn_top1_k20", "other"])
    value = result().values["knn_top1_k20"]
    low, high = result().intervals["knn_top1_k20"]
    cell = f"{100 * value:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
    assert t.columns == ["network", "knn_top1_k20", "other"] and t.rows[0] == ["a", cell, "1.5"]
    first, second, third, _ = results.text(t).splitlines()
    assert cell in second and len(first) == len(second) == len(third)
    assert results.markdown(t).splitlines()[:3] == [
        "| network | knn_top1_k20 | other |",
        "| --- | ---: | ---: |",
        f"| a | {cell} | 1.5 |",
    ]
    assert results.as_csv(t).splitlines()[1] == f'a,"{cell}",1.5'


def test_a_table_is_turned():
    t = results.table({"a": [result()], "b": [result("b", acc=0.6)]})
    u = results.turned(t)
    assert u.columns == ["value", "a", "b"] and [r[0] for r in u.rows] == t.columns[1:]
    assert [r[1] for r in u.rows] == t.rows[0][1:] and [r[2] for r in u.rows] == t.rows[1][1:]


def test_a_table_refuses_two_protocols_in_one_column():
    with pytest.raises(UserError, match=r"knn_top1_k20: .* differ in knn.k \(20 of a, 10 of b\)"):
        results.table({"a": [result()], "b": [result("b", k=10)]})
    with pytest.raises(UserError, match="differ in knn.k"):
        results.table({"a": [result(), result(k=10)]})
    with pytest.raises(UserError, match="nothing but the network or the versions, both of a"):
        results.table({"a": [result(), result(versions="2.15")]})
    t = results.table({"a": [result()], "b": [result("b", versions="2.15")]})
    assert "computed by other versions" in t.notes[1]
    with pytest.raises(UserError, match="none of the results has nothing"):
        results.table({"a": [result()]}, ["nothing"])


def test_parts_of_the_labels_have_columns_of_their_own():
    whole, part = result()._replace(what="linear"), result(acc=0.5)._replace(what="semi-1pct")
    t = results.table({"a": [whole, part]})
    assert t.columns[1:] == ["knn_top1_k20", "other", "semi-1pct/knn_top1_k20", "semi-1pct/other"]
    names = ["knn_top1_k20", "semi-1pct/knn_top1_k20"]
    assert list(results.versus([whole, part], [whole, part])) == names
    assert list(results.versus([whole, part], [whole, part], names[1:])) == names[1:]
    with pytest.raises(UserError, match="no value named nothing with stored predictions"):
        results.versus([whole], [part], ["nothing"])


def test_versus_pairs_the_same_images():
    a, b = result(), result("b", acc=0.6, seed=5)
    got = results.versus([a], [b])["knn_top1_k20"]
    assert got == intervals.paired(*(r.predictions["knn_top1_k20"] == r.labels for r in (a, b)))
    with pytest.raises(UserError, match="differ in knn.k"):
        results.versus([a], [result("b", k=10)])
    with pytest.raises(UserError, match="no value with stored predictions in common"):
        results.versus([a], [])
