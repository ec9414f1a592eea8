"""run.mirror: checkpoints go to object storage, and a run continues from there on another machine."""

import os
import shutil
from pathlib import Path

import object_storage
import pytest
import torch
from conftest import ranks, tiny
from image_sets import refuse
from training import _train, metrics

from fastdisco import config, models
from fastdisco.common.console import console
from fastdisco.common.urls import Url
from fastdisco.data import objects, pack
from fastdisco.models import manifest
from fastdisco.run.mirror import Mirror

URL = Url("s3://runs/all")
CONFIG = Path(__file__).with_name("tiny.yaml")


@pytest.fixture(scope="module")
def server():
    with object_storage.served() as proxy:
        yield proxy


@pytest.fixture
def proxy(server, monkeypatch, tmp_path):
    object_storage.prepared(monkeypatch, server, tmp_path / "cache")
    object_storage.empty("runs")
    server.asked.clear()
    yield server
    server.fail(None)


def settings(out, *overrides):
    return config.load(
        CONFIG,
        ["data.train=/x", f"run.out={out}", f"run.mirror={URL}", "checkpoint.keep=2", *overrides],
    )


def saved(run, step):
    """A checkpoint of two files, as saving.py leaves it."""
    folder = run / f"checkpoints/step_{step:08}"
    folder.mkdir(parents=True)
    files = {}
    for name in ("state.pt", "rank_0.pt"):
        torch.save({"step": step, "of": name}, folder / name)
        about = (folder / name).read_bytes()
        files[name] = {"size": len(about), "sha256": manifest.sha256(folder / name)}
    (folder / manifest.NAME).write_text(manifest.text(step, 1, files))
    (run / "checkpoints/last").write_text(folder.name)
    return folder


def copied(cfg, run, *steps):
    (run / "config.yaml").parent.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(config.dump(cfg))
    mirror = Mirror(cfg, run)
    for step in steps:
        saved(run, step)
        mirror.copy(step)
        mirror.close()
    return mirror


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_another_machine_gets_the_newest_checkpoint_bit_by_bit(proxy, tmp_path):
    cfg, here, there = settings(tmp_path), tmp_path / "here", tmp_path / "there"
    copied(cfg, here, 5, 10, 15)
    # As on disk, checkpoint.keep of them stay.
    assert objects.folders(URL / "tiny/checkpoints") == ["step_00000010", "step_00000015"]
    Mirror(cfg, there).fetch()
    name = (there / "checkpoints/last").read_text()
    assert name == "step_00000015" and not list(there.glob("checkpoints/.*"))
    assert contents(there / "checkpoints" / name) == contents(here / "checkpoints" / name)
    # A run's folder from then on, also if the command is refused for something else.
    assert config.load(there / "config.yaml") == cfg
    assert not (here / ".mirror.part").exists()


def test_a_folder_with_checkpoints_is_left_alone(proxy, tmp_path):
    cfg, here, there = settings(tmp_path), tmp_path / "here", tmp_path / "there"
    copied(cfg, here, 5)
    saved(there, 3)
    proxy.asked.clear()
    Mirror(cfg, there).fetch()
    assert not proxy.asked and (there / "checkpoints/last").read_text() == "step_00000003"


def test_what_is_damaged_or_not_whole_is_passed_over_and_told(proxy, tmp_path, capsys):
    cfg, here, there = settings(tmp_path), tmp_path / "here", tmp_path / "there"
    copied(cfg, here, 5, 10)
    newest = URL / "tiny/checkpoints/step_00000010"
    objects.write(newest / "state.pt", b"other")
    console.file = None
    Mirror(cfg, there).fetch()
    said = " ".join(capsys.readouterr().out.split())
    assert (there / "checkpoints/last").read_text() == "step_00000005"
    assert "state.pt: its bytes are not those that were stored" in said
    objects.remove(newest / manifest.NAME)
    shutil.rmtree(there)
    Mirror(cfg, there).fetch()
    assert (there / "checkpoints/last").read_text() == "step_00000005"
    objects.remove(URL / "tiny/checkpoints/step_00000005/rank_0.pt")
    refuse(Mirror(cfg, tmp_path / "third").fetch, parts=["rank_0.pt: is not there", "run.mirror"])
    assert not (tmp_path / "third/checkpoints/last").exists()


def test_another_configuration_is_refused_before_anything_is_fetched(proxy, tmp_path):
    copied(settings(tmp_path), tmp_path / "here", 5)
    other = settings(tmp_path, "run.epochs=9")
    refuse(Mirror(other, tmp_path / "there").fetch, parts=["s3://runs/all/tiny", "run.epochs"])
    assert not (tmp_path / "there").exists()


def test_overwrite_deletes_the_mirrors_checkpoints(proxy, tmp_path):
    cfg = settings(tmp_path)
    copied(cfg, tmp_path / "here", 5, 10)
    Mirror(cfg, tmp_path / "there").fetch(overwrite=True)
    assert objects.folders(URL / "tiny/checkpoints") == []


def test_an_error_is_told_once_and_the_next_checkpoint_is_copied(proxy, tmp_path, capsys):
    cfg, here = settings(tmp_path), tmp_path / "here"
    console.file = None
    proxy.fail("denied")
    mirror = copied(cfg, here, 5, 10)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("access is denied") == 1 and "copies the next one" in said
    proxy.fail(None)
    saved(here, 15)
    mirror.copy(15)
    mirror.close()
    assert objects.folders(URL / "tiny/checkpoints") == ["step_00000015"]


def test_a_copy_survives_that_the_run_deletes_its_checkpoint(proxy, tmp_path):
    cfg, here = settings(tmp_path), tmp_path / "here"
    proxy.fail("slow")
    mirror = Mirror(cfg, here)
    folder = saved(here, 5)
    wanted = contents(folder)
    mirror.copy(5)
    shutil.rmtree(folder)
    mirror.close()
    found = objects.listed(URL / "tiny/checkpoints/step_00000005")
    assert {name: objects.read(about) for name, about in found.items()} == wanted


def test_a_checkpoint_that_is_there_is_not_copied_again(proxy, tmp_path):
    cfg, here = settings(tmp_path), tmp_path / "here"
    mirror = copied(cfg, here, 5)
    proxy.asked.clear()
    mirror.copy(5)
    mirror.close()
    assert not [path for (method, path) in proxy.asked if path.endswith(".pt")]


def test_an_address_is_needed(tmp_path):
    for wrong in ("/disk/folder", "s3://"):
        refuse(settings, tmp_path, f"run.mirror={wrong}", parts=["run.mirror", "s3://bucket"])


# ---- whole trainings


def _with(variables, args):
    os.environ.update(variables)
    _train(args)


def test_a_training_from_object_storage_goes_on_on_another_machine(proxy, folder, tmp_path):
    tars = {name: tmp_path / "tars" / name for name in ("train", "val")}
    for name, where in tars.items():
        pack.pack(folder / name, where, shard_mb=0.1)
        pack.pack(folder / name, URL / "data" / name, shard_mb=0.1)
    variables = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "FASTDISCO_"))}

    def trained(out, where, steps, *overrides):
        paths = f"data.train={where}/train", f"data.val={where}/val"
        args = tiny(folder, out, *paths, f"run.max_steps={steps}", "checkpoint.every=2", *overrides)
        ranks(2, _with, variables, args)
        return out / "tiny/checkpoints" / f"step_{steps:08}"

    whole = trained(tmp_path / "whole", tmp_path / "tars", 7)
    mirror = f"run.mirror={URL}"
    first = trained(tmp_path / "first", URL / "data", 4, mirror)
    assert objects.folders(URL / "tiny/checkpoints")[-1] == first.name
    # Both ranks read each tar; one of them has fetched it.
    fetched = {path: n for (how, path), n in proxy.asked.items() if how == "GET" and ".tar" in path}
    assert set(fetched.values()) == {1} and any("/train/" in path for path in fetched)
    # Another machine: its folder and its cache are empty.
    variables["FASTDISCO_CACHE"] = str(tmp_path / "its cache")
    resumed = trained(tmp_path / "second", URL / "data", 7, mirror, f"data.cache={tmp_path}/other")
    assert list((tmp_path / "other/objects").glob("*.tar"))
    assert [x["step"] for x in metrics(tmp_path / "second/tiny") if "train/loss" in x] == [
        *range(1, 8)
    ]
    for name in ("state.pt", "rank_0.pt", "rank_1.pt"):
        one, two = (config.flatten(models.read(step / name)) for step in (whole, resumed))
        same = lambda a, b: torch.equal(a, b) if torch.is_tensor(a) else a == b
        assert one.keys() == two.keys() and [k for k in one if not same(one[k], two[k])] == []
