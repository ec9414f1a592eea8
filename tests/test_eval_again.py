"""Evaluating again: other images under the same names, another version of what computes, and what a
stopped command has finished."""

import shutil

import pytest
from PIL import Image, ImageOps
from test_eval_command import LINEAR, a_run, evaluate

from fastdisco import cli
from fastdisco.evals import results


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
