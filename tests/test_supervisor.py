"""`fastdisco run`: goes on after crashes, stops when it is asked to, and says when it gives up."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import HANGS, ROOT, tiny
from training import losses, metrics

from fastdisco import cli, config, data
from fastdisco.common import attempt, launch
from fastdisco.common.errors import UserError
from fastdisco.run import goodput, launching, students, supervisor

CRASHES = """
import os, sys, time
sys.path.insert(0, {root!r})
from fastdisco.data import TrainLoader
usual = TrainLoader.__next__
def breaks(self):
    where, mark = self.position, {mark!r}
    if where in {steps} and os.environ["RANK"] == "1" and not ({once} and os.path.exists(mark + str(where))):
        open(mark + str(where), "w").close()
        os.kill(os.getpid(), 9)
    return usual(self)
TrainLoader.__next__ = breaks
from fastdisco.commands.train import main
sys.exit(main())
"""


@pytest.fixture
def crashing(tmp_path, monkeypatch):
    """Of trainings from here on, rank 1 is killed in some steps (from 0 on), once or always."""

    def set_up(steps, once=True):
        script = tmp_path / "train.py"
        fill = dict(root=str(ROOT), mark=str(tmp_path / "mark"), steps=steps, once=once)
        script.write_text(CRASHES.format(**fill))
        monkeypatch.setattr(supervisor, "SCRIPT", script)

    # The handlers of this process.
    before = {number: signal.getsignal(number) for number in supervisor.SIGNALS}
    yield set_up
    for number, handler in before.items():
        signal.signal(number, handler)


def supervised(folder, out, *more, options=()):
    words = [str(x) for x in tiny(folder, out, "data.val=null", *more)]
    return cli.main(["run", *options, "--", *words])


def test_a_training_goes_on_after_crashes_on_the_devices_that_are_left(
    folder, tmp_path, crashing, monkeypatch, capfd
):
    crashing([3])
    # Twice before the first start.
    found = iter([2, 2, 1])
    monkeypatch.setattr(launching, "devices", lambda: next(found))
    # Step 2 is on disk before step 3 begins.
    more = ("run.max_steps=6", "checkpoint.every=2", "checkpoint.background=false")
    assert supervised(folder, tmp_path, *more, "--overwrite") == 0
    text = capfd.readouterr().out
    assert "the training ended in step 4 and is started again from step 2 in 1 s (1 of 100" in text
    assert "1 of 2 GPUs are left: the training goes on with 1 ranks" in text
    assert "2 ranks x 4 images x 1" in text and "1 ranks x 4 images x 2" in text
    assert "since the first start were steps that count (1 restart)" in text
    run = tmp_path / "tiny"
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    last = metrics(run)[-1]
    took = sum(m["perf/step_time"] for m in metrics(run) if "perf/step_time" in m)
    assert last["step"] == 6 and 0 < last["perf/goodput"] < 1
    assert last["perf/goodput"] <= took
    assert not (run / ".lock").exists()


@pytest.mark.slow
def test_a_step_that_fails_three_times_names_its_images(folder, tmp_path, crashing, capfd):
    crashing([3], once=False)
    more = ("run.max_steps=6", "checkpoint.every=2", "checkpoint.background=false")
    assert supervised(folder, tmp_path, *more, options=("--ranks", "2")) == 2
    text = capfd.readouterr().err
    assert "step 4 failed 3 times in a row" in text
    assert sum(line.strip().endswith(".jpg") for line in text.splitlines()) == 8


def test_a_refusal_is_not_started_again(folder, tmp_path, monkeypatch, capfd):
    started = []
    usual = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **more: started.append(a) or usual(*a, **more)
    )
    assert supervised(folder, tmp_path, "data.train=/nowhere") == 2
    assert len(started) == 1 and "started again" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        (["--config", "tests/tiny.yaml", "optim.lrr=1"], "unknown key optim.lrr"),
        (["--config", "tests/tiny.yaml", "--dry-run", "data.train=x"], "starts nothing"),
    ],
)
def test_a_mistake_starts_nothing(words, says, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert cli.main(["run", "--", *words]) == 2
    assert says in capsys.readouterr().err


# Tells as a rank does how it has ended; from the second start on it finishes.
TELLS = """
import os, sys
from fastdisco.common import attempt
again = os.path.exists({mark!r})
open({mark!r}, "w").close()
attempt.at(5)
{before}
attempt.ended(0 if again else {code})
{end}
sys.exit(0 if again else 1)
"""
KILLED = "if not again: os.kill(os.getpid(), 15)"


@pytest.mark.parametrize(
    "code, before, end, asked",
    [
        # By a signal to a rank, or to torchrun, which hands it on.
        (75, "attempt.why(attempt.ASKED)", "", True),
        # `deepspeed` dies of the signal, and its ranks save as orphans.
        (75, "", KILLED, True),
        # The ranks have lost their launcher.
        (75, "", "", False),
        # A hang: torchrun ends the other ranks by SIGTERM.
        (75, "attempt.why(attempt.ASKED); attempt.why(attempt.STALLED)", "", False),
        # A crash: torchrun ends the other ranks by SIGTERM.
        (1, "attempt.why(attempt.ASKED)", "", False),
    ],
)
def test_a_signal_below_the_supervisor_stops_the_run(
    code, before, end, asked, folder, tmp_path, crashing, monkeypatch, capfd
):
    crashing([])
    script = tmp_path / "tells.py"
    mark = str(tmp_path / "mark")
    script.write_text(TELLS.format(mark=mark, code=code, before=before, end=end))
    monkeypatch.setattr(supervisor, "SCRIPT", script)
    monkeypatch.setattr(launching, "starting", lambda launcher, ranks: [sys.executable])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert supervised(folder, tmp_path) == (launch.STOPPED if asked else 0)
    assert ("started again" in capfd.readouterr().out) == (not asked)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the supervisor", "the launcher", "a rank"])
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_it_stops_when_it_is_asked_to(launcher, whom, folder, tmp_path):
    more = ("run.epochs=100000", "log.every=1000000", "data.val=null", "checkpoint.every=3")
    words = [str(x) for x in tiny(folder, tmp_path, *more)]
    command = ["-m", "fastdisco.cli", "run", "--ranks", "2", "--launcher", launcher, "--", *words]
    path, run = tmp_path / "out.txt", tmp_path / "tiny"
    with path.open("w") as out:
        top = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out, stderr=out)
    try:
        end = time.monotonic() + HANGS
        while not (run / "checkpoints/last").exists():
            assert top.poll() is None and time.monotonic() < end, path.read_text()
            time.sleep(0.05)
        line = [top.pid]
        while below := _children(line[-1]):
            line.append(below[0])
        pid = {"the supervisor": top.pid, "the launcher": line[1], "a rank": line[-1]}[whom]
        # What Slurm sends; torchrun and deepspeed hand on SIGTERM alone.
        os.kill(pid, signal.SIGTERM if whom == "the launcher" else signal.SIGUSR1)
        assert top.wait(HANGS) == launch.STOPPED, path.read_text()
    finally:
        top.kill()
    text = path.read_text()
    step = int(text.split("stopped as asked after step ")[1].split(";")[0])
    assert goodput.saved(run) == step and "started again" not in text
    assert not (run / ".lock").exists()
    assert metrics(run)[-1].keys() == {"step", "time", "perf/goodput"}


def _children(pid):
    seen = {int(p): launch.process(int(p)) for p in os.listdir("/proc") if p.isdecimal()}
    return [p for p, found in seen.items() if found and found[1] == pid]


# ---- its parts


def test_the_steps_that_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [(20, 0.5), (40, 0.25), (60, 0.25), (80, 9.0)]
    entries = [json.dumps({"step": s, "perf/step_time": t}) for s, t in lines]
    entries.insert(2, json.dumps({"step": 40, "eval/knn_top1": 0.5}))
    path.write_text("\n".join([*entries, '{"step": 90, "per']))
    assert goodput.seconds(path, 0, 60) == 20 * 0.5 + 20 * 0.25 + 20 * 0.25
    assert goodput.seconds(path, 20, 60) == 10.0
    assert goodput.seconds(path, 60, 60) == 0


@pytest.mark.parametrize(
    "batch, most, ranks", [(8, 3, 2), (8, 4, 4), (12, 5, 4), (14, 6, 2), (7, 2, 1)]
)
def test_a_batch_is_divided_by_what_is_left(batch, most, ranks, folder, tmp_path):
    path, *overrides = [str(x) for x in tiny(folder, tmp_path)][1:]
    cfg = config.load(path, [*overrides, f"data.batch={batch}", "bn.groups=1"])
    assert launching.divisible(cfg, most) == ranks


def test_a_batch_that_nothing_divides_is_refused(folder, tmp_path):
    path, *overrides = [str(x) for x in tiny(folder, tmp_path)][1:]
    cfg = config.load(path, [*overrides, "bn.groups=3"])
    with pytest.raises(UserError, match=r"bn.groups: 3 does not divide"):
        launching.divisible(cfg, 2)


def test_the_images_of_a_step_are_those_that_the_loader_takes(folder, tmp_path):
    path, *overrides = [str(x) for x in tiny(folder, tmp_path)][1:]
    cfg = config.load(path, overrides)
    listing = data.listing(cfg.data.train, None)
    import torch

    loader = students.loader(cfg, listing, 8, torch.device("cpu"))
    for step, taken in zip(range(12), loader):
        names = [listing.files[i] for i in taken.index.tolist()]
        assert sorted(supervisor.batch(cfg, step)) == sorted(map(str, names))


def test_what_ranks_tell_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv(attempt.FOLDER, str(tmp_path))
    monkeypatch.setattr(attempt, "_last", dict(step=-1, code=-1, why=0))
    attempt._file.cache_clear()
    try:
        attempt.at(123456)
        attempt.at(7)
        me = (os.getpid(), launch.process(os.getpid())[0])
        assert attempt.read(tmp_path) == [(*me, 7, -1, 0)]
        attempt.why(attempt.STALLED)
        attempt.why(attempt.ASKED)
        attempt.ended(75)
        assert attempt.read(tmp_path) == [(*me, 7, 75, attempt.STALLED)]
        # Opened and not yet written.
        (tmp_path / "rank_10").touch()
        assert len(attempt.read(tmp_path)) == 1
    finally:
        os.close(attempt._file()[0])
        attempt._file.cache_clear()


def test_failures_in_a_row():
    assert [supervisor._in_a_row(x) for x in ([], [4], [4, 4], [4, 5], [5, 4, 4, 4])] == [
        0,
        1,
        2,
        1,
        3,
    ]
