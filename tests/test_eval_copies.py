"""Validation images that are copies of training images, under whatever names."""

import shutil

import pytest
from PIL import Image
from test_eval_command import a_run, evaluate

from fastdisco import cli, data
from fastdisco.common.errors import UserError
from fastdisco.data import source


@pytest.fixture(scope="module")
def run(textures, tmp_path_factory):
    return a_run(textures, tmp_path_factory.mktemp("runs"))


def copied(src, dst, take=lambda i: True):
    """Copies of the images, under other names; take: whether the i-th of a class."""
    for folder in sorted(src.iterdir()):
        (dst / folder.name).mkdir(parents=True)
        for i, path in enumerate(sorted(folder.iterdir())):
            if take(i):
                shutil.copy(path, dst / folder.name / f"copy{i}{path.suffix}")
    return dst


def packed(src, dst):
    assert cli.main(["data", "pack", str(src), str(dst)]) == 0
    return dst


@pytest.mark.parametrize("what", ["knn", "retrieve", "linear", "semi", "probe"])
def test_a_renamed_copy_is_refused(run, textures, capsys, tmp_path, what):
    val = copied(textures / "train", tmp_path / "val")
    code = 0 if what == "retrieve" else 2
    _, said = evaluate(capsys, what, run, f"--out={tmp_path}/out", f"data.val={val}", code=code)
    # Retrieval needs no training images, and so asks nothing of them.
    if code:
        assert "are also, byte for byte, images of" in said and "give data.val other images" in said


def test_a_part_of_a_copy_and_tars_are_refused(textures, tmp_path):
    train = data.listing(textures / "train")
    some = data.listing(copied(textures / "train", tmp_path / "some", lambda i: i % 5 == 2))
    tars = data.listing(packed(textures / "train", tmp_path / "tars"))
    for one, other in ((train, some), (tars, train), (train, tars), (tars, some)):
        with pytest.raises(UserError, match="8 of 8 images of it that were looked at"):
            source.no_copies(one, other)


def test_of_another_data_set_too(run, textures, capsys, tmp_path):
    val = copied(textures / "train", tmp_path / "val")
    sets = [f"transfer.train={textures}/train", f"transfer.val={val}"]
    _, said = evaluate(capsys, "transfer", run, f"--out={tmp_path}/out", *sets, code=2)
    assert "give transfer.val other images" in said


def test_a_few_copies_are_said_and_others_are_none(textures, tmp_path, capsys):
    train = data.listing(textures / "train")
    source.no_copies(train, data.listing(textures / "val"))
    assert not capsys.readouterr().out
    val = copied(textures / "val", tmp_path / "val")
    first = sorted((textures / "train" / "class0").iterdir())[0]
    shutil.copy(first, val / "class0" / "copy0.png")
    source.no_copies(train, data.listing(val))
    assert "1 of 8 images of it that were looked at are also" in capsys.readouterr().out
    # The same image in another file is not found, nor is one of another class.
    again = copied(textures / "train", tmp_path / "again")
    for path in again.rglob("*.png"):
        Image.open(path).save(path, compress_level=0)
    source.no_copies(train, data.listing(again))
    assert not capsys.readouterr().out


def test_large_classes_and_files_that_are_gone_are_passed_over(textures, tmp_path, monkeypatch):
    train = data.listing(textures / "train")
    val = data.listing(copied(textures / "train", tmp_path / "val"))
    shutil.rmtree(tmp_path / "val")
    source.no_copies(train, val)
    val = data.listing(copied(textures / "train", tmp_path / "other"))
    monkeypatch.setattr(source, "SEARCHED", 10)
    source.no_copies(train, val)
