"""Files that fastdisco wrote and that have become something else since: a pipe that nobody writes to, a
device without end, JSON of another kind.  Told in one sentence or passed over; never waited for."""

import json
import os
import resource
import signal

import numpy as np
import pytest

from fastdisco import config
from fastdisco.common.errors import UserError
from fastdisco.common.files import refused
from fastdisco.data import demo, pack
from fastdisco.evals import results
from fastdisco.export import place
from fastdisco.models import manifest
from fastdisco.report import collect, maps
from fastdisco.run import goodput, lock, log, loggers


@pytest.fixture(autouse=True)
def soon():
    """A read that waits for the other end of a pipe fails instead, as does one without end."""

    def late(*_):
        raise AssertionError("it waits")

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, limits[1]))
    signal.alarm(20)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_DATA, limits)
    signal.signal(signal.SIGALRM, before)


def pipe(path):
    os.mkfifo(path)


def endless(path):
    path.symlink_to("/dev/zero")


def nested(path):
    path.write_text("[" * 100_000)


def of_another_kind(path):
    path.write_text('{"step": "x", "perf/step_time": [], "seconds": {}}\n')


def no_text(path):
    path.write_bytes(b"\xff\xfe\0\1" * 9)


def _verified(path):
    folder = path.parent / "step_00000001"
    folder.mkdir()
    path.rename(folder / "manifest.json")
    (folder / "state.pt").write_bytes(b"x")
    manifest.verify(folder / "state.pt")


def _locked(path):
    os.utime(path, (0, 0), follow_symlinks=False)
    lock.Lock().take(path.parent)


def _goodput(path):
    (path.parent / "checkpoints").mkdir()
    (path.parent / "checkpoints/last").write_text("step_00000009")
    goodput.count(path.parent, 0.0, 1, 0)


def _packed(path):
    path.rename(path.parent / "manifest.json")
    pack._reuse(path.parent, "manifest.json", {"version": 1})


READERS = {
    "config.yaml": config.load,
    "metrics.jsonl": lambda path: log._entries(path, 9),
    ".lock": _locked,
    "m.json": _verified,
    "knn-01234567.json": results.read,
    "tsne.json": maps._content,
    "export.json": lambda path: place.earlier(path.parent, "x"),
    "env.json": lambda path: collect._object(path, []),
    "loggers.json": lambda path: loggers._known(path.parent),
    "p.json": _packed,
    "demo.json": lambda path: demo._reuse(path.parent, {"version": 1}),
}
LOGS = {
    "seen": lambda path: collect._entries(path, []),
    "goodput": _goodput,
    "kept": lambda path: log._entries(path, 9),
}


def _said(reader, path):
    """The one sentence that it is refused with; "" where it is read or passed over."""
    try:
        with refused():
            reader(path)
    except UserError as e:
        said = str(e)
    else:
        return ""
    assert said and "\n" not in said
    return said


@pytest.mark.parametrize("damage", [pipe, endless, nested, of_another_kind, no_text])
@pytest.mark.parametrize("name", READERS)
def test_a_file_of_ours_is_read_or_refused(tmp_path, name, damage):
    path = tmp_path / (demo.MANIFEST if name == "demo.json" else name)
    damage(path)
    said = _said(READERS[name], path)
    assert not said or (str(tmp_path) in said and len(said) < 1000), said


@pytest.mark.parametrize("damage", [pipe, endless, nested, of_another_kind, no_text])
@pytest.mark.parametrize("reader", LOGS)
def test_so_is_a_log(tmp_path, reader, damage):
    path = tmp_path / "metrics.jsonl"
    damage(path)
    said = _said(LOGS[reader], path)
    assert not said or str(path) in said, said


@pytest.mark.parametrize("text", ['{"a": 1}', '{"pid": "x"}', '{"pid": 10e99, "host": []}', "3"])
def test_a_lock_of_another_kind_is_taken_over(tmp_path, text, capsys):
    path = tmp_path / lock.NAME
    path.write_text(text)
    os.utime(path, (0, 0))
    with lock.Lock() as own:
        own.take(tmp_path)
        assert "took over the lock" in capsys.readouterr().out


# ---- results of evaluations


@pytest.fixture
def result(tmp_path):
    rows = np.arange(12) % 3
    protocol = {"network": {"fingerprint": "x"}, "versions": {}}
    found = results.make("knn", {"knn_top1": 0.5}, protocol, 1.0, {"knn_top1": rows}, rows)
    return results.write(tmp_path, found)


def test_a_whole_result_is_read_as_it_was(result):
    found = results.read(result)
    assert found.values == {"knn_top1": 0.5} and len(found.labels) == 12


def _without(key):
    def damage(path):
        found = json.loads(path.read_text())
        del found[key]
        path.write_text(json.dumps(found))

    return damage


def _with(**other):
    def damage(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | other))

    return damage


def _beside(write):
    """Damages the predictions."""

    def damage(path):
        there = path.with_suffix(".npz")
        content = there.read_bytes()
        there.unlink()
        write(there, content)

    return damage


def _flipped(path, content):
    content = bytearray(content)
    content[len(content) // 3] ^= 64
    path.write_bytes(content)


def _other_arrays(path, _):
    with path.open("wb") as f:
        np.savez(f, labels=np.arange(3))


def _too_few(path, _):
    with path.open("wb") as f:
        np.savez(f, labels=np.arange(3), names=["knn_top1"], predictions=np.zeros((1, 2), int))


DAMAGES = [
    *(_without(x) for x in ("what", "values", "intervals", "seconds", "protocol", "hash")),
    *(_with(values=3), _with(values={"a": "b"}), _with(seconds="x"), _with(what=["x"])),
    *(_with(intervals={"knn_top1": [0]}), _with(intervals={"knn_top1": ["a", "b"]})),
    _beside(lambda path, content: path.write_bytes(content[: len(content) // 2])),
    _beside(lambda path, content: path.write_bytes(b"")),
    _beside(lambda path, content: path.write_bytes(b"no archive")),
    *(_beside(_flipped), _beside(_other_arrays), _beside(_too_few)),
    *(_beside(lambda path, _: pipe(path)), _beside(lambda path, _: endless(path))),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_a_damaged_result_is_refused_and_left_out_of_a_report(result, number):
    DAMAGES[number](result)
    with pytest.raises(UserError) as e:
        results.read(result)
    assert "\n" not in str(e.value) and str(result.parent) in str(e.value)
    remarks = []
    assert not collect.measured(result.parent, result.parent / "export", remarks).results
    assert len(remarks) == 1 and "left out" in remarks[0]


def test_a_result_without_a_network_is_refused(tmp_path):
    found = results.make("knn", {"knn_top1": 0.5}, {"versions": {}}, 1.0)
    path = results.write(tmp_path, found)
    with pytest.raises(UserError, match="is no result"):
        results.read(path)


def test_a_result_that_cannot_be_written_leaves_no_part(result, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    before = sorted(os.listdir(result.parent))
    with pytest.raises(OSError, match="No space") as e:
        results.write(result.parent, results.read(result))
    assert e.value.filename == str(result.with_suffix(".npz"))
    assert sorted(os.listdir(result.parent)) == before
