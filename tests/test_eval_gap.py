"""How far each class is behind the teacher, and how much of the gap is closed."""

import csv

import pytest
from test_eval_command import a_run, evaluate

from fastdisco.evals import health, results


@pytest.fixture(scope="module")
def run(textures, tmp_path_factory):
    return a_run(textures, tmp_path_factory.mktemp("runs"))


def test_every_class_has_its_gap_in_a_file(textures, run, capsys, tmp_path):
    other, out = a_run(textures, tmp_path, seed=1), tmp_path / "results"
    values, said = evaluate(capsys, "health", run, f"--out={out}", f"health.teacher={other}")
    (result,) = [r for r in results.read_all(out) if r.what == "health-teacher"]
    (path,) = out.glob("*.csv")
    assert path.name == f"health-teacher-{result.hash}.classes.csv" and str(path) in said
    rows = list(csv.DictReader(path.open()))
    assert [r["class"] for r in rows] == ["class0", "class1", "class2"]
    assert {r["images"] for r in rows} == {"10"}
    student, teacher, gap = ([float(r[k]) for r in rows] for k in ("student", "teacher", "gap"))
    assert gap == pytest.approx([t - s for s, t in zip(student, teacher)])
    # Classes are of equal size here, so that the mean is that of all images.
    assert sum(gap) / 3 == pytest.approx(values["eval/teacher_gap"]) and any(gap)
    assert sum(student) / 3 == pytest.approx(
        neighbours_alone(run, textures, tmp_path, capsys), abs=1e-9
    )


def neighbours_alone(run, textures, tmp_path, capsys):
    """Accuracy of the student by the other validation images, from what `embed` writes."""
    import numpy as np

    evaluate(capsys, "embed", run, f"--out={tmp_path}/x", f"embed.out={tmp_path}/embedded")
    x, y = (np.load(tmp_path / f"embedded/{n}.npy") for n in ("features", "labels"))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = (x @ x.T).astype(float)
    np.fill_diagonal(cosine, -np.inf)
    right = 0
    for row, own in zip(cosine, y):
        near = np.argsort(-row)[:20]
        votes = np.bincount(y[near], np.exp((row[near] - 1) / 0.07), 3)
        right += votes.argmax() == own
    return right / len(y)


def test_classes_without_images_have_no_accuracy(tmp_path):
    import torch

    label = torch.tensor([0, 0, 2])
    found = health.by_class(label, torch.tensor([0, 1, 0]), label, 3)
    assert found == [(2, 1.0, 0.5), (0, None, None), (1, 1.0, 0.0)]


def test_no_gap_to_close_is_said(textures, run, capsys, tmp_path):
    more = f"health.teacher={run}", f"health.alone={run}"
    values, said = evaluate(capsys, "health", run, f"--out={tmp_path}", *more)
    assert "eval/teacher_gap_closed" not in values
    assert "teacher_gap_closed: left out: the teacher" in said and "is no better than" in said
