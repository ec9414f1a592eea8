"""Evaluating again: other images under the same names, another version of what computes, and what a
stopped command has finished."""

import shutil
import signal

import pytest
from PIL import Image, ImageOps
from test_eval_command import LINEAR, a_run, evaluate

from fastdisco import cli
from fastdisco.commands import kept
from fastdisco.commands.measure import Work
from fastdisco.evals import results
from fastdisco.evals.linear import Heads


@pytest.fixture(scope="module")
def run(textures, tmp_path_factory):
    return a_run(textures, tmp_path_factory.mktemp("runs"))


def test_other_images_under_the_same_names_are_another_protocol(run, textures, capsys, tmp_path):
    dark = tmp_path / "dark"
    shutil.copytree(textures / "val", dark)
    for path in dark.rglob("*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    out = tmp_path / "results"
    a, _ = evaluate(capsys, "retrieve", run, f"--out={out}")
    b, _ = evaluate(capsys, "retrieve", run, f"--out={out}", f"data.val={dark}")
    assert a != b
    found = results.read_all(out)
    assert len(found) == 2 and {r.values["map"] for r in found} == {a["eval/map"], b["eval/map"]}
    assert cli.main(["eval", "table", str(out)]) == 2
    assert "they differ in data.val.bytes (" in capsys.readouterr().err
    # A moved folder is the same data.
    shutil.copytree(textures / "val", tmp_path / "moved")
    evaluate(capsys, "retrieve", run, f"--out={out}", f"data.val={tmp_path}/moved")
    assert len(results.read_all(out)) == 2


def steps_of(monkeypatch, stop_at=None):
    """Counts the steps of trainings; SIGTERM reaches the process in one of them."""
    done, before = [0], Heads.step

    def step(self, *args):
        done[0] += 1
        if done[0] == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return before(self, *args)

    monkeypatch.setattr(Heads, "step", step)
    return done


def test_a_stopped_command_does_not_train_again_what_it_had_finished(
    run, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(kept, "LOOK", 1)
    # Of two epochs of 2 steps, two of 8, and three of 4 the last two steps are missing.
    parts = ["semi.shares=[0.2, 1]", "semi.epochs=2", "semi.batch=8", "semi.lr=0.1"]
    arguments = ["all", run, "--only=semi,linear", *parts, *LINEAR]
    with monkeypatch.context() as m:
        whole = steps_of(m)
        want, _ = evaluate(capsys, *arguments, f"--out={tmp_path}/whole")
    with monkeypatch.context() as m:
        steps_of(m, stop_at=whole[0] - 2)
        assert cli.main(["eval", *map(str, arguments), f"--out={tmp_path}/cut"]) == 75
    capsys.readouterr()
    with monkeypatch.context() as m:
        left = steps_of(m)
        values, said = evaluate(capsys, *arguments, f"--out={tmp_path}/cut")
    assert left == [2] and values == want
    assert said.count("continues after epoch 2, step 0") == 2
    assert "linear: continues after epoch 2, step 2" in said
    assert not list((tmp_path / "cut").glob("*.pt"))
    # Another command that was not stopped measures anew.
    with monkeypatch.context() as m:
        again = steps_of(m)
        evaluate(capsys, *arguments, f"--out={tmp_path}/cut")
    assert again == whole


def test_after_an_upgrade_the_newest_result_stands_in_the_table(run, capsys, tmp_path, monkeypatch):
    folder, more = tmp_path / "results", ["knn.k=[1, 5]"]
    evaluate(capsys, "retrieve", run, f"--out={folder}")
    evaluate(capsys, "knn", run, f"--out={folder}", *more)
    monkeypatch.setattr(Work, "versions", {"torch": "9.9"})
    evaluate(capsys, "knn", run, f"--out={folder}", *more)
    assert len(results.read_all(folder)) == 3
    assert cli.main(["eval", "table", str(folder), "--format=csv"]) == 0
    out, err = capsys.readouterr()
    assert "results: 1 results by other versions (" in err and "torch" in err
    assert out.startswith("value,results\n") and "\nmap," in out
    assert out.count("knn_top1_k5_t0.07,") == 1
    assert cli.main(["eval", "table", str(folder), "--versus", str(folder)]) == 0
    capsys.readouterr()
    # Two protocols are still two.
    evaluate(capsys, "knn", run, f"--out={folder}", "knn.k=[1, 20]")
    assert cli.main(["eval", "table", str(folder)]) == 2
    assert "they differ in knn.k" in capsys.readouterr().err
