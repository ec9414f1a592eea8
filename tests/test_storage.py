"""What a training does where the file system fails: one sentence with path and reason, it goes on
where it can, and the last checkpoint stays whole."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ranks, tiny
from training import _fails, _told, losses, train_a_teacher

from fastdisco import cli
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.common.files import refused
from fastdisco.run import checkpoint, saving
from fastdisco.run.appended import Appended
from fastdisco.run.board import Board
from fastdisco.run.saver import Saver


def items(values):
    item = checkpoint.Item(lambda: values["x"], lambda x: values.update(x=x))
    return {"x": item, "own": checkpoint.Item(lambda: 0, lambda _: None, own=True)}


def _save(run, step, n=1000):
    checkpoint.save(run, step, items({"x": torch.full((n,), step)}), {}, keep=2)


def _restored(run):
    values = {}
    step = checkpoint.restore(run, items(values), {})
    assert (values["x"] == step).all()
    return step


# ---- every call that a save makes, failing


class _Faults:
    """Lets the n-th call that names or writes a file below a folder fail."""

    EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir")

    def __init__(self):
        self.folder, self.left, self.number = None, None, None
        # A hook stays until the process ends.
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if self.folder and event in self.EVENTS and str(args[0]).startswith(self.folder):
            self.call(args[0])

    def call(self, path=None):
        self.left -= 1
        if self.left == 0:
            raise OSError(self.number, os.strerror(self.number), *([str(path)] if path else []))

    @contextlib.contextmanager
    def at(self, n, number, folder):
        self.left, self.number, self.folder = n, number, str(folder)
        try:
            yield
        finally:
            self.folder = None


@pytest.fixture(scope="module")
def faults():
    return _Faults()


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE]
)
def test_a_save_that_fails_at_any_call_is_told_and_leaves_the_last_one(
    number, faults, tmp_path, monkeypatch
):
    fsync = os.fsync

    def synced(fd):
        if faults.folder:
            faults.call()
        fsync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    _save(tmp_path, 1)
    n, failed = 0, 0
    while True:
        n += 1
        error = ""
        with faults.at(n, number, tmp_path):
            try:
                _save(tmp_path, 2)
            except UserError as e:
                error = str(e)
        if error:
            failed += 1
            assert os.strerror(number) in error and str(tmp_path) in error, (n, error)
            assert "\n" not in error
        left = faults.left
        # Where `last` is not yet on disk, either of both is right.
        assert _restored(tmp_path) in (1, 2)
        if left > 0:
            break
        shutil.rmtree(tmp_path / "checkpoints")
        _save(tmp_path, 1)
    assert failed >= 10
    assert _restored(tmp_path) == 2
    # What could not be removed in a try is gone after the next.
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    assert names == ["last", "step_00000001", "step_00000002"]


# ---- in a training


def _with_faults(trains, args, rank, steps):
    """What `trains` returns, while on that rank the files of these steps cannot be written."""
    write = saving._to_disk

    def fails(path, value):
        if dist.rank() == rank and any(f"{s:08}" in str(path) for s in steps):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, value)

    saving._to_disk = fails
    return trains(args)


def test_the_training_goes_on_and_the_next_checkpoint_is_tried(folder, tmp_path):
    args = ("run.max_steps=6", "checkpoint.every=2", "data.val=null")
    text = ranks(2, _with_faults, _told, tiny(folder, tmp_path, *args), 1, [4])[0]
    (line,) = (x for x in text.splitlines() if "could not be saved" in x)
    assert line.startswith("step 4: ") and "rank_1.pt: No space left on device" in line
    assert "the newest is step_00000002; the training goes on" in line
    assert "done: 6 steps" in text
    assert checkpoint.last(tmp_path / "tiny").name == "step_00000006"
    ranks(2, _told, tiny(folder, tmp_path / "whole", *args))
    assert losses(tmp_path / "tiny") == losses(tmp_path / "whole/tiny")


def test_a_run_whose_last_checkpoint_fails_is_not_done(folder, tmp_path):
    args = tiny(folder, tmp_path, "run.max_steps=4", "checkpoint.every=2", "data.val=null")
    code, error = ranks(1, _with_faults, _fails, args, 0, [4])[0]
    assert code == 2 and error.count("\n") == 1
    assert "step 4: its checkpoint could not be saved" in error
    assert "the newest is step_00000002; mend that" in error
    assert "done: 4 steps" in ranks(1, _told, args)[0]
    assert sorted(losses(tmp_path / "tiny")) == [1, 2, 3, 4]


def _describes(args):
    """What the command says where the folder becomes read-only before it is described."""
    from fastdisco.run import folder as folders

    def fails(path, _):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    folders.write_whole = fails
    return _fails(args)


def test_a_run_that_cannot_be_described_is_refused(folder, tmp_path):
    args = tiny(folder, tmp_path, "run.max_steps=1", "data.val=null")
    code, error = ranks(1, _describes, args)[0]
    assert code == 2 and error.count("\n") == 1
    assert "config.yaml: Read-only file system; make it writable" in error


def _tb_is_a_file(run):
    (run / "tb").write_text("")


def _metrics_are_a_folder(run):
    os.remove(run / "metrics.jsonl")
    (run / "metrics.jsonl").mkdir()


def _checkpoints_are_a_file(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    ranks(1, _told, tiny(folder, out, "run.max_steps=1", "data.val=null"))
    return out


def test_what_stands_in_the_way_is_named(folder, trained, tmp_path):
    damage = {
        "tb: File exists": _tb_is_a_file,
        "metrics.jsonl: Is a directory": _metrics_are_a_folder,
        "checkpoints: ": _checkpoints_are_a_file,
    }
    for i, (says, damages) in enumerate(damage.items()):
        run = shutil.copytree(trained, tmp_path / str(i)) / "tiny"
        if damages is _tb_is_a_file:
            shutil.rmtree(run / "tb")
        damages(run)
        args = tiny(folder, run.parent, "run.max_steps=2", "data.val=null")
        code, error = ranks(1, _fails, args)[0]
        assert code == 2 and error.count("\n") == 1 and says in error, error


def test_a_name_that_is_too_long_is_one_sentence(folder, tmp_path):
    args = tiny(folder, tmp_path, f"run.name={'n' * 300}", "run.max_steps=1")
    code, error = ranks(1, _fails, args)[0]
    assert code == 2 and error.count("\n") == 1 and "at most 200 bytes" in error


# ---- file systems that really fail


@pytest.fixture
def small(tmp_path):
    """A file system of 2 MB."""
    if os.getuid() != 0:
        pytest.skip("root: mounts file systems")
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("root: may not mount here")
    yield path
    subprocess.run(["umount", "-l", str(path)], capture_output=True)


def fill(path):
    with contextlib.suppress(OSError), (path / "filler").open("wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))


def test_free_space_is_looked_at_before_a_save(small):
    _save(small, 1)
    with pytest.raises(UserError, match=r"small/checkpoints: 8.0 MB are needed and 2\.\d MB"):
        _save(small, 2, 10**6)
    assert os.listdir(small / "checkpoints") and _restored(small) == 1


def test_a_disk_that_fills_during_a_save(small, monkeypatch):
    _save(small, 1)
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage("/"))
    with pytest.raises(UserError, match=r"state\.pt: No space left on device"):
        _save(small, 2, 10**6)
    # What was written of it is gone, so that others have the space.
    assert sorted(os.listdir(small / "checkpoints")) == ["last", "step_00000001"]
    assert _restored(small) == 1
    _save(small, 3)
    assert _restored(small) == 3


def test_metrics_wait_in_memory_until_the_disk_has_space(small, capsys):
    path = small / "metrics.jsonl"
    file = Appended(path, 0)
    entries = [f'{{"step": {i}, "x": "{"x" * 3000}"}}\n'.encode() for i in range(9)]
    file.add(entries[0])
    fill(small)
    for entry in entries[1:5]:
        file.add(entry)
    (small / "filler").unlink()
    for entry in entries[5:]:
        file.add(entry)
    file.close()
    assert path.read_bytes() == b"".join(entries)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "metrics.jsonl: No space left on device; what cannot be written is kept" in said[0]
    assert "can be written again" in said[1]


def test_what_is_lost_at_the_end_is_told(small, capsys):
    file = Appended(small / "metrics.jsonl", 0)
    fill(small)
    for _ in range(3):
        file.add(b"x" * 5000)
    file.close()
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith("No space left on device; 3 entries are lost")
    )


def test_a_file_system_that_turns_read_only_and_back(small, capsys):
    _save(small, 1)
    file = Appended(small / "metrics.jsonl", 0)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    file.add(b"a\n")
    with pytest.raises(UserError, match="Read-only file system"):
        _save(small, 2)
    assert _restored(small) == 1
    subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
    file.add(b"b\n")
    _save(small, 2)
    assert _restored(small) == 2 and (small / "metrics.jsonl").read_bytes() == b"a\nb\n"
    assert "Read-only file system" in capsys.readouterr().out


def test_a_mount_that_vanishes_is_not_written_behind(small, capsys):
    _save(small, 1)
    file = Appended(small / "metrics.jsonl", 0)
    saver = Saver(small, items({"x": torch.ones(1)}), {}, 2)
    subprocess.run(["umount", "-l", str(small)], check=True)
    file.add(b"a\n")
    saver.save(2, ends=False)
    assert os.listdir(small) == []
    text = capsys.readouterr().out
    assert text.count("the file system that held it is gone") == 2
    with pytest.raises(UserError, match="step 3: its checkpoint could not be saved .* is gone"):
        saver.save(3, ends=True)


# ---- the event files


def test_tensorboard_reads_what_is_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 2):
        board = Board(tmp_path / "tb", start)
        for step in range(start + 1, 5):
            board.write(step, {"train/loss": step + start / 10, "eval/knn_top1": 0.5})
        board.close()
    found = EventAccumulator(str(tmp_path / "tb"))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == ["eval/knn_top1", "train/loss"]
    values = [(e.step, round(e.value, 4)) for e in found.Scalars("train/loss")]
    # The second attempt's in place of the first's after step 2.
    assert values == [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2)]


# ---- other commands


def test_packing_onto_a_full_disk_is_one_sentence_and_goes_on_later(folder, small, capsys):
    fill(small)
    # Some room for the beginning, none for the tar.
    os.truncate(small / "filler", os.path.getsize(small / "filler") - 16384)
    command = ["data", "pack", str(folder / "train"), str(small / "packed")]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "small/packed" in line and "No space left on device; make space there" in line
    os.remove(small / "filler")
    assert cli.main(command) == 0
    names = sorted(os.listdir(small / "packed"))
    assert "manifest.json" in names and not [n for n in names if "part" in n]


def test_recording_a_teacher_onto_a_full_disk_is_one_sentence(folder, small):
    train_a_teacher(folder, small.parent, steps=1)
    fill(small)
    teacher = [f"teacher.file={small.parent}/teacher", "teacher.arch=test_resnet"]
    cache = ["teacher.cache=record", f"teacher.cache_folder={small}/z", "teacher.cache_rounds=1"]
    args = tiny(folder, small.parent / "out", *teacher, *cache, "data.val=null", "run.max_steps=1")
    code, error = ranks(1, _fails, args)[0]
    assert code == 2 and error.count("\n") == 1, error
    assert "small/z" in error and ("No space left" in error or "cannot be taken there" in error)


def test_an_error_that_names_no_path_is_told_only_where_it_is_a_disks():
    with pytest.raises(UserError, match="^No space left on device; make space"), refused():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ConnectionResetError), refused():
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
