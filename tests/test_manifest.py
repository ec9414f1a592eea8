"""Checkpoints are verified: a damaged, lost or swapped file is found, and all ranks continue from the
newest checkpoint that is whole."""

import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from conftest import ranks

from fastdisco import models
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.models import manifest
from fastdisco.run import checkpoint

STEPS = (1, 2, 3)


def items(values):
    """A state that all share and one of each rank's own, in a dict."""
    return {
        "shared": checkpoint.Item(lambda: values["shared"], lambda x: values.update(shared=x)),
        "own": checkpoint.Item(lambda: values["own"], lambda x: values.update(own=x), own=True),
    }


def _join():
    if dist.world() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


def _saves(run, steps):
    _join()
    for step in steps:
        values = {"shared": torch.full((50,), step), "own": torch.tensor([step, dist.rank()])}
        checkpoint.save(run, step, items(values), {"data": "x"}, keep=3)


def _restores(run):
    """(step, what was restored, what was said), or the error."""
    _join()
    values, said = {}, []
    checkpoint.say = said.append
    try:
        step = checkpoint.restore(run, items(values), {"data": "x"})
    except UserError as e:
        return str(e)
    own = values.get("own")
    return step, values["shared"][0].item(), own if own is None else own.tolist(), said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{ranks: a run with three checkpoints}"""
    found = {n: tmp_path_factory.mktemp(f"ranks{n}") for n in (1, 2)}
    for n, run in found.items():
        ranks(n, _saves, run, STEPS)
    return found


@pytest.fixture
def run(saved, tmp_path):
    """A copy of the run of two ranks."""
    return shutil.copytree(saved[2], tmp_path / "run")


def step(run, n):
    return run / "checkpoints" / f"step_{n:08}"


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_manifest_lists_size_and_digest_of_every_file(run):
    for n in STEPS:
        found = json.loads((step(run, n) / manifest.NAME).read_text())
        assert found["step"] == n and found["world"] == 2
        files = {p.name: p.read_bytes() for p in step(run, n).iterdir()}
        del files[manifest.NAME]
        assert found["files"] == {
            name: {"size": len(x), "sha256": hashlib.sha256(x).hexdigest()}
            for name, x in files.items()
        }
        assert sorted(files) == ["rank_0.pt", "rank_1.pt", "state.pt"]
        assert models.read(step(run, n) / "state.pt")["world"] == 2


def test_whole_checkpoints_are_restored_without_a_word(run):
    assert ranks(2, _restores, run) == [(3, 3, [3, rank], []) for rank in (0, 1)]


def _swap(folder):
    os.replace(folder / "rank_0.pt", folder / "x")
    os.replace(folder / "rank_1.pt", folder / "rank_0.pt")
    os.replace(folder / "x", folder / "rank_1.pt")


def _of_step_2(name):
    return lambda folder: shutil.copy(folder.with_name("step_00000002") / name, folder / name)


def _resigned(folder):
    """Swapped, with a manifest that says so."""
    _swap(folder)
    path = folder / manifest.NAME
    found = json.loads(path.read_text())
    a, b = (found["files"].pop(f"rank_{i}.pt") for i in (0, 1))
    found["files"] |= {"rank_0.pt": b, "rank_1.pt": a}
    path.write_text(json.dumps(found))


DAMAGE = {
    "state flipped": (lambda f: flip(f / "state.pt", 700), "state.pt: is damaged"),
    # Between two records, where no checksum of the zip looks.
    "padding flipped": (lambda f: flip(f / "state.pt", 120), "state.pt: is damaged"),
    "state cut": (lambda f: os.truncate(f / "state.pt", 900), "state.pt: has 900 bytes instead"),
    "state gone": (lambda f: (f / "state.pt").unlink(), "state.pt: cannot be read"),
    "another step's state": (_of_step_2("state.pt"), "state.pt: is damaged or of another"),
    "rank 1 flipped": (lambda f: flip(f / "rank_1.pt", -1), "rank_1.pt: is damaged"),
    "rank 1 gone": (lambda f: (f / "rank_1.pt").unlink(), "rank_1.pt: is not there, but 2 ranks"),
    "swapped": (_swap, "rank_0.pt: is damaged or of another checkpoint or rank"),
    "swapped and signed": (_resigned, "rank_0.pt: is the file of rank 1"),
    "another step's rank": (_of_step_2("rank_1.pt"), "rank_1.pt: is damaged or of another"),
    "manifest flipped": (lambda f: flip(f / manifest.NAME, 0), "manifest.json: is no manifest"),
    "manifest nested": (lambda f: (f / manifest.NAME).write_text("[" * 99999), "no manifest"),
    "manifest empty": (lambda f: (f / manifest.NAME).write_text("{}"), "no manifest"),
    "manifest gone": (lambda f: (f / manifest.NAME).unlink(), "manifest.json: is gone"),
    "folder empty": (lambda f: [p.unlink() for p in f.iterdir()], "state.pt: cannot be read"),
}


def _restores_each(runs):
    return [_restores(run) for run in runs]


@pytest.fixture(scope="module")
def restored(saved, tmp_path_factory):
    """{damage: both ranks' result}"""
    runs = []
    for damage, _ in DAMAGE.values():
        runs.append(shutil.copytree(saved[2], tmp_path_factory.mktemp("damaged") / "run"))
        damage(step(runs[-1], 3))
    return dict(zip(DAMAGE, zip(*ranks(2, _restores_each, runs))))


@pytest.mark.parametrize("name", DAMAGE)
def test_all_ranks_continue_from_the_newest_whole_checkpoint(name, restored):
    first, second = restored[name]
    assert first[:3] == (2, 2, [2, 0]) and second[:3] == (2, 2, [2, 1])
    (text,) = first[3]
    assert DAMAGE[name][1] in text
    assert "continuing from step_00000002, the newest whole checkpoint" in text
    assert "step_00000003" in text and "\n" not in text


def test_several_damaged_checkpoints_are_all_named(run):
    flip(step(run, 3) / "state.pt", 700)
    flip(step(run, 2) / "rank_0.pt", 700)
    first, second = ranks(2, _restores, run)
    assert first[:3] == (1, 1, [1, 0]) and second[:3] == (1, 1, [1, 1])
    assert re.search(
        "step_00000003/state.pt: .*step_00000002/rank_0.pt: .*from step_00000001", *first[3]
    )


def test_where_none_is_whole_the_run_is_refused_in_one_sentence(run):
    for n in STEPS:
        flip(step(run, n) / "state.pt", 700)
    first, second = ranks(2, _restores, run)
    assert first == second and "\n" not in first
    named = ".*; .*".join(f"step_0000000{n}/state.pt: is damaged" for n in STEPS[::-1])
    assert re.search(f"{named}.*; with no whole checkpoint .*--overwrite", first)


def test_the_next_save_leaves_the_whole_ones_and_removes_the_damaged(run):
    flip(step(run, 3) / "state.pt", 700)
    ranks(2, _saves, run, [2])
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["last", "step_00000001", "step_00000002"]


def _named(text):
    return lambda last: last.write_text(text)


def _directory(last):
    last.unlink()
    last.mkdir()


def _dangling(last):
    last.unlink()
    last.symlink_to("nowhere")


def _pipe(last):
    last.unlink()
    os.mkfifo(last)


LAST = {
    "gone": lambda last: last.unlink(),
    "empty": _named(""),
    "no text": lambda last: last.write_bytes(b"\xff\0" * 900),
    "another name": _named("../../elsewhere"),
    "no folder": _named("step_00000009"),
    "many digits": _named("step_" + "9" * 5000),
    "folder": _directory,
    "link": _dangling,
    "pipe": _pipe,
}


@pytest.mark.parametrize("damage", LAST.values(), ids=LAST)
def test_a_damaged_last_is_told_and_the_newest_checkpoint_taken(damage, run, capsys):
    damage(run / "checkpoints/last")
    values = {}
    # One rank: the rank files of two are not asked for.
    assert checkpoint.restore(run, items(values), {}) == 3
    text = capsys.readouterr().out
    assert "checkpoints/last: " in text and "continuing from step_00000003" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("damage", [LAST[x] for x in LAST if x != "gone"])
def test_a_damaged_last_refuses_other_commands(damage, run):
    damage(run / "checkpoints/last")
    with pytest.raises(UserError, match="checkpoints/last: "):
        models.last(run)


def test_an_older_name_in_last_is_obeyed(run):
    (run / "checkpoints/last").write_text("step_00000001\n")
    assert [x[:2] for x in ranks(2, _restores, run)] == [(1, 1)] * 2


def test_other_ranks_files_do_not_matter_to_another_number_of_ranks(run):
    _swap(step(run, 3))
    assert ranks(1, _restores, run) == [(3, 3, None, [])]


def _as_before(folder):
    """As an older version has written it."""
    (folder / manifest.NAME).unlink()
    for path in folder.iterdir():
        found = torch.load(path)
        found.pop("world" if path.name == "state.pt" else "rank")
        torch.save(found, path)


def test_a_checkpoint_of_an_older_version_resumes_and_is_told_once(run):
    for n in STEPS:
        _as_before(step(run, n))
    first, second = ranks(2, _restores, run)
    assert first[:3] == (3, 3, [3, 0]) and second[:3] == (3, 3, [3, 1])
    (text,) = first[3]
    assert "older version of fastdisco" in text
    # Then a lost file is found as before.
    (step(run, 3) / "rank_1.pt").unlink()
    first, second = ranks(2, _restores, run)
    assert first[0] == second[0] == 2 and "rank_1.pt: is not there, but 2 ranks" in first[3][0]


def test_what_is_no_checkpoint_is_read_without_its_neighbours_manifest(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "state.pt")
    (tmp_path / manifest.NAME).write_text('{"name": "my app"}')
    assert models.read(tmp_path / "state.pt")["x"].item() == 1


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "state.pt")
    with pytest.raises(UserError, match="not a file"):
        models.read(tmp_path / "state.pt")


def test_a_copy_of_a_users_stays(run):
    shutil.copytree(step(run, 1), run / "checkpoints/step_00000001.good")
    ranks(2, _saves, run, [4, 5])
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    numbered = [f"step_0000000{n}" for n in (3, 4, 5)]
    assert names == ["last", "step_00000001.good", *numbered]
