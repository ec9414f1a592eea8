"""What of an earlier attempt a run keeps: checkpoints up to the one it goes on from, whole lines of
its log; and files of the wrong kind."""

import json

import pytest

from fastdisco import config
from fastdisco.config import UserError
from fastdisco.run import log, saving
from fastdisco.run.folder import agree


@pytest.mark.parametrize(
    "there, now, keep, stay",
    [
        ([1, 2, 3], 3, 2, [2, 3]),
        # Somebody went back to an older step: what came after it is another training's.
        ([1, 2, 3, 4, 15], 15, 1, [15]),
        ([10, 15, 30, 40], 15, 2, [10, 15]),
        ([15, 30], 15, 1, [15]),
    ],
)
def test_what_last_names_is_never_removed(tmp_path, there, now, keep, stay):
    names = {n: f"step_{n:08}" for n in there}
    folder = tmp_path / "checkpoints"
    for name in names.values():
        (folder / name).mkdir(parents=True)
    saving._prune(folder / names[now], keep)
    assert sorted(p.name for p in folder.iterdir()) == [names[n] for n in stay]


def test_torn_lines_of_the_log_are_dropped_and_said(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": n, "train/loss": 1.5}) + "\n" for n in (1, 2, 3)]
    path.write_bytes("".join(whole).encode() + b'{"step": 4, "train/lo' + b"\n\x00\xff\n7\n")
    assert log._entries(path, 2) == whole[:2]
    assert "3 damaged lines dropped" in capsys.readouterr().out
    assert log._entries(path, 0) == []
    path.write_text("".join(whole))
    assert log._entries(path, 9) == whole and capsys.readouterr().out == ""


def test_a_configuration_that_is_no_text_is_told(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"run: {name: \xff\xfe}")
    with pytest.raises(UserError, match="x.yaml: is no text in UTF-8; give --config"):
        config.load(path)


@pytest.mark.parametrize("name", ["out", "out/tiny"])
def test_a_file_in_place_of_the_runs_folder_is_told(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    raw = {"run": {"name": "tiny", "out": str(tmp_path / "out")}, "data": {"train": "x"}}
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"{name}: is a file, .*take another run.out"):
            agree(config.validate(raw, "test"), overwrite)
