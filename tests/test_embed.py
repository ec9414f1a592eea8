"""`fastdisco eval embed`: any images, with or without classes, to .npy or parquet."""

import importlib.util
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_eval_command import a_run, evaluate

from fastdisco import cli, data
from fastdisco.common.errors import UserError
from fastdisco.evals import embed
from fastdisco.evals.features import Features

needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="extra: pyarrow is not installed"
)


@pytest.fixture(scope="module")
def run(textures, tmp_path_factory):
    return a_run(textures, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(run, textures, tmp_path_factory):
    """The features of the validation images by their bare names."""
    out = tmp_path_factory.mktemp("whole")
    assert cli.main(["eval", "embed", str(run), f"--out={out}", f"embed.out={out}/e"]) == 0
    names = (out / "e/names.txt").read_text().split()
    return dict(zip((Path(n).name for n in names), np.load(out / "e/features.npy")))


def same_as(whole, folder):
    names = (folder / "names.txt").read_text().split()
    rows = np.load(folder / "features.npy")
    assert len(names) == len(rows) > 0
    want = np.stack([whole[Path(n).name] for n in names])
    np.testing.assert_allclose(rows, want, atol=1e-5)
    return names


def test_a_folder_a_list_and_tars_without_classes(run, whole, textures, capsys, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (textures / "val").rglob("*.png"):
        shutil.copy(path, flat)
    # What systems and users leave beside images, and what the quarantine names.
    (flat / "@eaDir").mkdir()
    (flat / "notes.txt").write_text("x")
    (flat / "quarantine.tsv").write_text("val003.png\tbroken\n")
    bare = tmp_path / "names.txt"
    bare.write_text("# without classes\nflat/val001.png\nflat/val000.png\n")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        for path in sorted((textures / "val").rglob("*.png")):
            tar.add(path, path.name)
    for source, count in ((flat, 29), (bare, 2), (tmp_path / "tars", 30)):
        more = [f"--out={tmp_path}/out", f"embed.out={tmp_path}/e"]
        asked = [f"embed.data={source}", "data.quarantine=quarantine.tsv"]
        values, said = evaluate(capsys, "embed", run, *asked, *more)
        assert values["eval/images"] == count
        assert ("passed over: 1 " in said) == (source == flat)
        names = same_as(whole, tmp_path / "e")
        if source == bare:
            assert names == ["flat/val001.png", "flat/val000.png"]


def test_what_has_other_images_beside_is_no_flat_folder(textures, tmp_path):
    assert data.listing(textures / "val", bare=True).classes == ["class0", "class1", "class2"]
    (tmp_path / "a.png").touch()
    (tmp_path / "class0").mkdir()
    (tmp_path / "class0/b.png").touch()
    found = data.listing(tmp_path, bare=True)
    assert found.files == ["class0/b.png"] and found.passed_over
    # Training needs classes, or one that is said to be one.
    shutil.rmtree(tmp_path / "class0")
    with pytest.raises(UserError, match="no class folders, 1 images lie in it directly"):
        data.listing(tmp_path)
    (tmp_path / "list.txt").write_text("a.png\nclass0/b.png 1\n")
    for bare in (False, True):
        with pytest.raises(UserError, match="line 1 is no `<image> <class>`"):
            data.listing(tmp_path / "list.txt", bare=bare)
    (tmp_path / "list.txt").write_text("../a.png\n")
    with pytest.raises(UserError, match="line 1 leads out"):
        data.listing(tmp_path / "list.txt", bare=True)


def test_another_protocol_has_another_folder(run, textures, capsys, tmp_path):
    for resize in (32, 40):
        evaluate(capsys, "embed", run, f"--out={tmp_path}", f"data.eval_resize={resize}")
    folders = sorted(p for p in tmp_path.iterdir() if p.is_dir())
    assert len(folders) == 2
    assert all((p.parent / f"{p.name}.json").exists() for p in folders)
    a, b = (np.load(p / "features.npy") for p in folders)
    assert a.shape == b.shape and not np.allclose(a, b)


@needs_pyarrow
def test_parquet_has_what_npy_has(run, textures, capsys, tmp_path):
    import pyarrow
    import pyarrow.parquet

    for form in ("npy", "parquet"):
        more = f"--out={tmp_path}", f"embed.out={tmp_path}/{form}", f"embed.format={form}"
        evaluate(capsys, "embed", run, *more)
    assert sorted(p.name for p in (tmp_path / "parquet").iterdir()) == [
        "classes.json",
        "embed.parquet",
    ]
    table = pyarrow.parquet.read_table(tmp_path / "parquet/embed.parquet")
    assert table.column_names == ["name", "label", "features", "embedding"]
    assert table["name"].to_pylist() == (tmp_path / "npy/names.txt").read_text().split("\n")[:-1]
    assert table["label"].to_pylist() == np.load(tmp_path / "npy/labels.npy").tolist()
    for kind in ("features", "embedding"):
        want = np.load(tmp_path / f"npy/{kind}.npy")
        assert table.schema.field(kind).type == pyarrow.list_(pyarrow.float32(), want.shape[1])
        found = table[kind].combine_chunks().flatten().to_numpy().reshape(want.shape)
        assert np.array_equal(found, want)
    classes = json.loads((tmp_path / "parquet/classes.json").read_text())
    assert classes == data.listing(textures / "val").classes


def two_images(names):
    listing = data.Listing("x", "x", names, np.zeros(2, np.int64), ["a"])
    features = Features(torch.rand(2, 3), torch.zeros(2).long(), torch.arange(2))
    return {"features": features}, listing


@needs_pyarrow
def test_names_that_are_no_text_are_refused_by_parquet_alone(tmp_path):
    kinds, listing = two_images(["a.png", "b\udcff.png"])
    with pytest.raises(UserError, match="1 names are not UTF-8, such as b.\\.png; rename"):
        embed.run(kinds, listing, tmp_path, "parquet")
    assert not list(tmp_path.iterdir())
    embed.run(kinds, listing, tmp_path, "npy")
    assert (tmp_path / "names.txt").read_bytes() == b"a.png\nb\xff.png\n"


def test_without_pyarrow_parquet_is_refused_before_the_pass(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(embed.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(data.EvalLoader, "__iter__", lambda self: pytest.fail("a pass"))
    said = evaluate(capsys, "embed", run, f"--out={tmp_path}", "embed.format=parquet", code=2)[1]
    assert "parquet needs pyarrow, which is not installed; pip install pyarrow" in said
