"""Temporary files of killed processes are removed at the next start, those of others never."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from conftest import ROOT, TESTS

from fastdisco import config
from fastdisco.common import temporary
from fastdisco.common.files import write_whole
from fastdisco.run import folder as folders
from fastdisco.run.lock import Lock

# Makes a temporary file and a temporary folder as the trainer does, says their names, and waits.
MAKER = """
import pathlib, sys, tempfile, time
from fastdisco.common import temporary
part = temporary.part(pathlib.Path(sys.argv[1]))
part.write_text("half")
print(part.name, tempfile.mkdtemp(prefix=temporary.prefix()), flush=True)
time.sleep(3600)
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(process, its file beside a config.yaml, its folder in TMPDIR)"""
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp))
    monkeypatch.setattr(tempfile, "tempdir", None)
    run = tmp_path / "out/tiny"
    run.mkdir(parents=True)
    command = [sys.executable, "-c", MAKER, str(run / "config.yaml")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as p:
        name, folder = p.stdout.readline().split()
        yield p, run / name, tmp / os.path.basename(folder)
        p.kill()


def _kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def _claim(run):
    cfg = config.load(TESTS / "tiny.yaml", ["data.train=/data", f"run.out={run.parent}"])
    with Lock() as lock:
        folders.claim(cfg, False, lock)


def test_what_a_live_process_writes_stays(made):
    _, part, folder = made
    _claim(part.parent)
    assert part.exists() and folder.exists()


def test_what_a_killed_one_left_is_removed_and_blocks_nothing(made):
    process, part, folder = made
    (folder / "files").touch()
    _kill(process)
    _claim(part.parent)
    assert not part.exists() and not folder.exists()


def _age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


STRANGERS = [
    ".notes.part",
    "x.part",
    ".download.0123456789ab.part",
    # Of an older version and of another machine: a day decides.
    ".config.yaml.0123456789ab.part",
    ".config.yaml.00000000-1-2-0123456789ab.part",
]


@pytest.mark.parametrize("days, left", [(0, STRANGERS), (2, STRANGERS[:3])])
def test_what_is_not_known_to_be_ours_stays(days, left, tmp_path):
    for name in STRANGERS:
        (tmp_path / name).touch()
        _age(tmp_path / name, days * 86400)
    temporary.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(left)


@pytest.mark.skipif(os.getuid() != 0, reason="root: gives files to another user")
def test_another_users_files_stay(made):
    process, part, folder = made
    _kill(process)
    for path in (part, folder):
        os.chown(path, 12345, 12345)
    temporary.sweep(part.parent)
    temporary.sweep_tmpdir()
    assert part.exists() and folder.exists()


def test_a_link_is_removed_and_what_it_names_is_not(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    link = tmp_path / ".config.yaml.0123456789ab.part"
    link.symlink_to(kept)
    os.utime(link, (0, 0), follow_symlinks=False)
    temporary.sweep(tmp_path)
    assert not link.is_symlink() and (kept / "file").exists()


def test_checkpoints_that_were_half_written_go_under_the_lock(tmp_path):
    part = tmp_path / "tiny/checkpoints/.step_00000007.part"
    part.mkdir(parents=True)
    (part / "state.pt").write_bytes(b"half")
    cfg = config.load(TESTS / "tiny.yaml", ["data.train=/data", f"run.out={tmp_path}"])
    (tmp_path / "tiny/config.yaml").write_text(config.dump(cfg))
    _claim(tmp_path / "tiny")
    assert not part.exists()


@pytest.mark.parametrize("name", ["a" * 255, "ü" * 127])
def test_a_name_may_be_as_long_as_the_system_allows(name, tmp_path):
    write_whole(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]


def test_a_write_that_fails_leaves_no_part(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as e:
        write_whole(tmp_path / "a", "x")
    assert e.value.filename == str(tmp_path / "a") and not os.listdir(tmp_path)
