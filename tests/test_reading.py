"""Configurations as people write them: keys written twice, names that YAML takes for numbers, paths
with ~ and variables."""

import re

import pytest
from test_config import BASE, error, load

from fastdisco import cli, config

DOCUMENT = """\
run: {name: x}
data: {train: /t}
optim:
  lr: 1
student: {arch: resnet18}
optim:
  momentum: 0.5
"""


@pytest.mark.parametrize(
    "text, key, lines",
    [
        (DOCUMENT, "optim", "3 and 6"),
        ("run: {name: x}\ndata:\n  batch: 8\n  train: /t\n  batch: 16\n", "batch", "3 and 5"),
        ("run: {name: x}\ndata: {train: /t}\nviews: [{count: 2, count: 3}]", "count", "3 and 3"),
        ("run: &a {name: x}\ndata: {train: /t}\nrun: *a", "run", "1 and 3"),
    ],
)
def test_a_key_written_twice_is_refused(tmp_path, text, key, lines):
    says = error(tmp_path, text)
    assert "c.yaml" in says and f"key {key} " in says and f"lines {lines}" in says, says


def test_a_key_written_twice_in_an_override_or_a_base_is_refused(tmp_path):
    says = error(tmp_path, BASE, "student.kwargs={drop_rate: 0, drop_rate: 1}")
    assert "student.kwargs=" in says and "drop_rate" in says and "twice" in says
    (tmp_path / "base.yaml").write_text(DOCUMENT)
    assert "base.yaml" in error(tmp_path, "base: base.yaml\nrun: {name: y}")


def test_merged_keys_may_be_set_again(tmp_path):
    text = "run: &r {name: x, epochs: 3}\ndata: {train: /t}\noptim: {lr: 1}\n"
    assert (
        load(tmp_path, text + "students: [{<<: {arch: resnet18, lr: 1}, lr: 2}]").students[0].lr
        == 2
    )


NAMES = ["20241125", "007", "1e5", "0x1f", "2024-11-25", "3.10", "1_000", "on", "off", "yes"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_text_that_was_written(tmp_path, name):
    assert load(tmp_path, BASE, f"run.name={name}").run.name == name
    cfg = load(
        tmp_path,
        f"run: {{name: {name}, out: {name}}}\ndata: {{train: {name}}}\n"
        f"students:\n- arch: resnet18\n  name: {name}\n- {{arch: resnet34}}\n",
    )
    assert cfg.run.name == str(cfg.run.out) == str(cfg.data.train) == cfg.students[0].name == name
    # As a run's folder keeps it.
    assert load(tmp_path, config.dump(cfg)) == cfg


def test_other_values_stay_what_they_are(tmp_path):
    override = "student.kwargs={a: 007, b: on, c: 1e-1}"
    cfg = load(
        tmp_path, BASE, "run.seed=017", override, "teacher={file: 5, cache: off}", "bn.shuffle=on"
    )
    assert cfg.run.seed == 15 and cfg.student.kwargs == {"a": 7, "b": True, "c": 0.1}
    assert str(cfg.teacher.file) == "5" and cfg.teacher.arch is None
    assert cfg.teacher.cache == "off" and cfg.bn.shuffle == "gather"
    assert load(tmp_path, BASE, "data.val=null").data.val is None
    assert "run.name" in error(tmp_path, BASE, "run.name=null")
    assert "run.name" in error(tmp_path, BASE, "run.name=[1]")


def test_paths_know_the_home_folder_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    monkeypatch.setenv("FASTDISCO_DATA", "/fast/disk")
    cfg = load(
        tmp_path,
        "run: {name: x, out: ~/runs}\ndata: {train: $FASTDISCO_DATA/train, val: '${FASTDISCO_DATA}/x-{0..9}.tar'}\n"
        "teacher: {file: ~/teacher.pth}",
        "teacher.cache_folder=$FASTDISCO_DATA/cache",
        "data.quarantine=~/q.txt",
    )
    found = cfg.run.out, cfg.data.train, cfg.data.val, cfg.teacher.file, cfg.teacher.cache_folder
    assert list(map(str, found)) == [
        "/home/of/mine/runs",
        "/fast/disk/train",
        "/fast/disk/x-{0..9}.tar",
        "/home/of/mine/teacher.pth",
        "/fast/disk/cache",
    ]
    assert str(cfg.data.quarantine) == "/home/of/mine/q.txt"
    assert load(tmp_path, config.dump(cfg)) == cfg
    for override in ("run.out=$OF_NO_PROGRAM/runs", "data.val=${OF_NO_PROGRAM}/val"):
        says = error(tmp_path, BASE, override)
        assert re.match(r".*: (run\.out|data\.val): \$OF_NO_PROGRAM is not set", says), says
    assert "no user" in error(tmp_path, BASE, "run.out=~nobody_of_that_name/x")
    # What is no variable and no home stays.
    for path in ("a$", "cost$/x", "x~y", "a/~/b"):
        assert str(load(tmp_path, BASE, f"run.out={path}").run.out) == path


def test_paths_of_options_do_too(tmp_path, monkeypatch, capsys):
    """A shell replaces ~ in `--out ~/x`, not in `--out=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list.txt").write_text("1.jpg 0\n")
    (tmp_path / "1.jpg").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "check", "~/list.txt", "--out=~/found"]) == 2
    assert (tmp_path / "found/quarantine.txt").exists() and not (tmp_path / "~").exists()
    with pytest.raises(SystemExit) as e:
        cli.main(["data", "check", "$OF_NO_PROGRAM/list.txt"])
    assert e.value.code == 2 and "$OF_NO_PROGRAM is not set" in capsys.readouterr().err
