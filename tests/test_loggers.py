"""`log.to`: where metrics go beside metrics.jsonl, that a failure there ends no training, and that a
run that continues goes on with the same run there.  Nothing is sent anywhere."""

import json
import struct
import subprocess
import sys
import threading
import time
import types

import pytest
from conftest import ROOT

from fastdisco import config
from fastdisco.common.errors import UserError
from fastdisco.run import log, loggers
from fastdisco.run.board import Board


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def configured(*names, name="x"):
    raw = {"run": {"name": name}, "data": {"train": "a", "val": "b"}, "log": {"to": [*names]}}
    return config.validate(raw, "test")


def attempt(cfg, folder, start, steps, values=lambda step: {"train/loss": step / 2}):
    """What a training from `start` on would log."""
    folder.mkdir(exist_ok=True)
    with log.Log(folder, start, 100, loggers.create(cfg, folder, start)) as writes:
        for step in steps:
            writes.write(step, values(step))


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- the configuration


def test_the_default_is_tensorboard_alone(tmp_path):
    cfg = config.validate({"run": {"name": "x"}, "data": {"train": "a", "val": "b"}}, "test")
    (made,) = loggers.create(cfg, tmp_path, 0)
    assert isinstance(made, Board) and cfg.log.to == ["tensorboard"]
    assert loggers.create(configured(), tmp_path / "none", 0) == []


def test_another_name_is_refused():
    with pytest.raises(UserError, match=r"log\.to"):
        configured("comet")


def test_an_absent_package_is_refused_before_the_training(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    loggers.check(["tensorboard"])
    with pytest.raises(
        UserError, match=r"wandb is not installed; pip install 'fastdisco\[wandb\]'"
    ):
        loggers.check(["tensorboard", "wandb"])


def test_a_package_is_imported_only_where_it_is_asked_for(tmp_path):
    code = (
        "import sys; from fastdisco import config; from fastdisco.run import loggers\n"
        "from pathlib import Path\n"
        "raw = {'run': {'name': 'x'}, 'data': {'train': 'a', 'val': 'b'}}\n"
        "loggers.create(config.validate(raw, 'x'), Path(sys.argv[1]), 0)[0].close()\n"
        "print([m for m in ('wandb', 'mlflow') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# ---- failures


class Failing:
    """A package that fails where it is told to."""

    def __init__(self, *where, error=None):
        self.where, self.seen = where, []
        self.error = error or RuntimeError("no such\nhost")

    def __call__(self, cfg, folder):
        self.maybe("start")
        return types.SimpleNamespace(write=self.write, close=lambda: self.maybe("close"))

    def write(self, step, values):
        self.maybe("write")
        self.seen.append(step)

    def maybe(self, what):
        if what in self.where:
            raise self.error


@pytest.mark.parametrize("where", ["start", "write", "close"])
@pytest.mark.parametrize("error", [RuntimeError("no such\nhost"), SystemExit(1), ImportError("x")])
def test_a_failure_is_said_once_and_ends_no_training(where, error, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(loggers._STARTS, "wandb", Failing(where, error=error))
    attempt(configured("wandb", "tensorboard"), tmp_path / "x", 0, range(1, 5))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith(f"log.to: wandb failed ({type(error).__name__}")
    assert said[0].endswith("training goes on, and metrics.jsonl has what is missing there")
    assert [e["step"] for e in entries(tmp_path / "x")] == [1, 2, 3, 4]


def test_after_a_failure_later_entries_are_tried_again(tmp_path, monkeypatch):
    package = Failing("write")
    monkeypatch.setitem(loggers._STARTS, "wandb", package)
    (logger,) = loggers.create(configured("wandb"), tmp_path, 0)
    logger.write(1, {"x": 1.0})
    while not logger._failed:
        pass
    package.where = ()
    logger.write(2, {"x": 2.0})
    logger.close()
    assert package.seen == [2]


def test_a_server_that_does_not_answer_holds_nobody_up(tmp_path, monkeypatch, capsys):
    answer = threading.Event()
    monkeypatch.setattr(loggers, "WAITING", 3)
    monkeypatch.setattr(loggers, "CLOSING", 0.1)
    package = Failing()
    monkeypatch.setitem(loggers._STARTS, "mlflow", lambda *a: answer.wait() and package(*a))
    cfg = configured("mlflow")
    attempt(cfg, tmp_path / "x", 0, range(1, 8))
    assert len(entries(tmp_path / "x")) == 7
    (said,) = capsys.readouterr().out.splitlines()
    assert "mlflow failed (more than 3 entries wait for it, the oldest are dropped)" in said
    answer.set()


def test_closing_twice_is_closing_once(tmp_path, monkeypatch):
    closed = []
    made = types.SimpleNamespace(write=lambda *_: None, close=lambda: closed.append(1))
    monkeypatch.setitem(loggers._STARTS, "wandb", lambda cfg, folder: made)
    (logger,) = loggers.create(configured("wandb"), tmp_path, 0)
    logger.close()
    logger.close()
    assert closed == [1]


@pytest.mark.parametrize("content", ["", "[", "[]", '{"wandb": 3}', "[" * 99999])
def test_a_damaged_file_of_ids_is_made_anew(content, tmp_path):
    (tmp_path / loggers.NAME).write_text(content)
    found = loggers._id(tmp_path, "wandb")
    assert loggers._id(tmp_path, "wandb") == found and len(found) == 8


# ---- the packages themselves


def test_mlflow_keeps_one_run_in_a_local_database(tmp_path):
    from mlflow import MlflowClient

    folder, cfg = tmp_path / "x", configured("mlflow", name="run+1")
    values = lambda step: {"train/a+b/loss": step / 2, "eval/knn_top1": 0.5}
    attempt(cfg, folder, 0, range(1, 5), values)
    first = loggers._known(folder)["mlflow"]
    attempt(cfg, folder, 4, range(5, 7), values)
    assert loggers._known(folder)["mlflow"] == first
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.get_run(first)
    assert (found.info.run_name, found.info.status) == ("run+1", "FINISHED")
    assert found.data.params["optim.lr"] == str(cfg.optim.lr)
    history = client.get_metric_history(first, "train/a_b/loss")
    assert [(m.step, m.value) for m in history] == [(s, s / 2) for s in range(1, 7)]

    # One that was deleted there cannot be continued.
    loggers._remember(folder, "mlflow", "0" * 32)
    attempt(cfg, folder, 6, range(7, 8), values)
    second = loggers._known(folder)["mlflow"]
    assert second != "0" * 32 and client.get_run(second).info.status == "FINISHED"


def test_wandb_keeps_one_run_offline(tmp_path):
    folder, cfg = tmp_path / "x", configured("wandb")
    attempt(cfg, folder, 0, range(1, 4))
    # It names the folder of an attempt after the second.
    time.sleep(1.1)
    attempt(cfg, folder, 3, range(4, 6))
    name = loggers._known(folder)["wandb"]
    files = sorted(folder.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2
    logged = [row for file in files for row in history(file)]
    assert logged == [(step, step / 2) for step in range(1, 6)]


def history(file):
    """(step, loss) of each line that a file of wandb's holds."""
    from wandb.proto import wandb_internal_pb2

    for content in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            row = {
                ".".join(i.nested_key) or i.key: json.loads(i.value_json)
                for i in record.history.item
            }
            yield row["_step"], row["train/loss"]


def records(content):
    """The records of a file in LevelDB's log format, after wandb's header of 7 bytes: blocks of
    32 KiB of pieces with checksum, length and kind (whole, first, middle, last)."""
    assert content.startswith(b":W&B")
    at, whole = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""
