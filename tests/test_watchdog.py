"""A run that gets no further ends, and says which rank waits for what."""

import json
import os
import signal
import subprocess
import sys
import time

import nodes
import pytest
import torch
from conftest import HANGS, ROOT, run, tiny

from fastdisco.common import heart, launch
from fastdisco.run import watchdog
from fastdisco.run.watchdog import Beat, Watchdog, sentence

# A rank of a training; `before` is what goes wrong in it.
RANK = """
import os, sys, time
from fastdisco.run import watchdog
# The first step is not what these tests are about, and a busy machine takes its time.
watchdog.LONG = 300
before, *arguments = sys.argv[1:]
exec(before)
from fastdisco.commands import train
sys.exit(train.main(arguments))
"""
SLEEPS = """
from fastdisco.data import TrainLoader
usual = TrainLoader.__next__
def dawdle(self):
    if self.position == 3 and os.environ["RANK"] == "1":
        time.sleep(3600)
    return usual(self)
TrainLoader.__next__ = dawdle
"""


def started(folder, out, before=""):
    """Two ranks of a training without end, each with its own output; and the store they meet at."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | dict(
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    more = ("run.epochs=100000", "data.val=null", "run.stall_seconds=8")
    command = [sys.executable, "-c", RANK, before, *map(str, tiny(folder, out, *more))]
    told = []
    for rank in "01":
        path = out / f"{rank}.txt"
        with path.open("w") as f:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env | {"RANK": rank, "LOCAL_RANK": rank}, stdout=f, stderr=f
            )
        told.append((process, path))
    return store, told


def until(condition, *processes):
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end and all(p.poll() is None for p, _ in processes), [
            path.read_text()[-2000:] for _, path in processes
        ]
        time.sleep(0.05)


def ended(told):
    try:
        codes = [p.wait(HANGS) for p, _ in told]
    finally:
        for p, _ in told:
            p.kill()
    return codes, [path.read_text() for _, path in told]


def test_a_rank_that_sleeps_in_data(folder, tmp_path):
    _, told = started(folder, tmp_path, SLEEPS)
    codes, texts = ended(told)
    assert codes == [launch.STOPPED] * 2, texts
    assert "rank 1 on " in texts[1] and "in data of step 4" in texts[1]
    # The stack of the one that is to blame, once.
    assert texts[1].count("in dawdle") == 1 and "in dawdle" not in texts[0]
    assert "run.stall_seconds: 8" in texts[1]
    # The other one's clock may have struck before or after.
    waits = "in exchange of step 4, which waits for rank 1 on " in texts[0]
    assert waits or "as another rank had to" in texts[0], texts[0]
    assert "Traceback" not in texts[0], texts[0]
    assert not (tmp_path / "tiny/.lock").exists()


@pytest.mark.slow
def test_a_rank_that_is_halted(folder, tmp_path):
    _, told = started(folder, tmp_path)
    metrics = tmp_path / "tiny/metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, *told)
    (first, _), (second, path) = told
    try:
        second.send_signal(signal.SIGSTOP)
        assert first.wait(HANGS) == launch.STOPPED
        text = told[0][1].read_text()
        assert f"waits for rank 1 on {os.uname().nodename} (process {second.pid})" in text
        assert "no sign for" in text and "Traceback" not in text
    finally:
        second.send_signal(signal.SIGCONT)
    # It finds that the other one has ended.
    assert ended(told)[0] == [launch.STOPPED] * 2, path.read_text()


def beat(rank, phase, silent=9.0, age=1.0, ended=False, step=11):
    return Beat(rank, "abc"[rank], 100 + rank, step, phase, silent, ended, age)


@pytest.mark.parametrize(
    "me, others, says",
    [
        (
            beat(0, "exchange"),
            [beat(1, "data", 8.0), beat(2, "exchange")],
            "rank 0 on a: no progress for 9 s in exchange of step 12, which waits for rank 1 on b "
            "(process 101), which has been in data of step 12 for 8 s; the same command ",
        ),
        (
            beat(1, "data"),
            [beat(0, "exchange")],
            "rank 1 on b: no progress for 9 s in data of step 12; ",
        ),
        (
            beat(0, "exchange"),
            [beat(1, "exchange", age=70.0)],
            "(process 101), which has given no sign for 70 s: it is halted or dead, or its host",
        ),
        # It has said what it had to say.
        (beat(0, "exchange"), [beat(1, "save", age=70.0, ended=True)], "been in save of step 12"),
        (beat(0, "exchange"), [beat(1, "exchange")], "as are all ranks: the network between them"),
        (beat(0, "exchange"), [None], "waits for a rank without a heartbeat"),
        (beat(0, "start", step=-1), [], "no progress for 9 s in start-up; "),
        (beat(0, "exchange", step=-1), [beat(1, "start", step=-1)], "has been in start-up for 9 s"),
    ],
)
def test_the_sentence(me, others, says):
    assert says in sentence(me, others)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "{}",
        "[1]",
        "[" * 100_000,
        '[1, "b", 101, "11", "data", 9, false]',
        '[1, "b", 101, 11, "data", null, false]',
        '[1, null, 101, 11, "data", 9, false]',
    ],
    ids=range(8),
)
def test_a_heartbeat_of_another_form_is_none(tmp_path, text):
    path = watchdog._path(tmp_path, 1)
    path.write_text('[1, "b", 101, 11, "data", 9.0, false]\n')
    assert watchdog._read(tmp_path, 1, path.stat().st_mtime + 2) == beat(1, "data", age=2.0)
    path.write_text(text)
    assert watchdog._read(tmp_path, 1, 0.0) is None


def test_start_evaluations_and_saves_may_take_longer(monkeypatch):
    dog = Watchdog(10)
    monkeypatch.setattr(heart, "heart", heart.heart)
    limits = []
    for phase, done in (("start", 0), ("forward", 0), ("forward", 1), ("evaluate", 1), ("save", 1)):
        heart.enter(phase)
        if done:
            dog.done()
        limits.append(dog._limit())
    assert limits == [40, 40, 10, 40, 40]
    assert dog.longest == 40 and Watchdog(None).longest is None


def test_no_watchdog_no_thread_and_no_heartbeat(tmp_path):
    with Watchdog(None) as dog, dog.following(tmp_path, []):
        assert not dog._thread.is_alive() and list(tmp_path.iterdir()) == []


def test_a_heartbeat_lives_as_long_as_its_run(tmp_path):
    with Watchdog(3600) as dog, dog.following(tmp_path, []):
        dog.step(4)
        dog._write(1.0, False)
        (found,) = (tmp_path / watchdog.NAME).iterdir()
        rank, _, pid, step, phase, *_ = json.loads(found.read_text())
        assert (rank, pid, step, phase) == (0, os.getpid(), 4, "data")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_hangs_holds_nothing_up(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_ANSWERS", 0.05)
    bounded, done = watchdog._Bounded(), []
    bounded.run(lambda: time.sleep(0.5))
    assert bounded.busy
    bounded.run(lambda: done.append(1))
    assert done == []
    bounded._thread.join()
    bounded.run(lambda: done.append(2))
    bounded._thread.join()
    assert done == [2]


@pytest.mark.slow
def test_a_link_that_is_cut_for_good(folder, tmp_path):
    more = ("run.epochs=100000", "data.val=null", "run.stall_seconds=15")
    arguments = [str(x) for x in tiny(folder, tmp_path, *more)]
    with nodes.two_nodes() as names:
        processes = []
        for rank, name in enumerate(names):
            env = os.environ | dict(
                RANK=str(rank),
                LOCAL_RANK="0",
                WORLD_SIZE="2",
                MASTER_ADDR=nodes.ADDRESSES[0],
                MASTER_PORT="29500",
                GLOO_SOCKET_IFNAME="eth0",
            )
            command = ["ip", "netns", "exec", name, sys.executable, "-c", RANK, "", *arguments]
            path = tmp_path / f"{rank}.txt"
            with path.open("w") as f:
                processes.append(
                    (subprocess.Popen(command, cwd=ROOT, env=env, stdout=f, stderr=f), path)
                )
        metrics = tmp_path / "tiny/metrics.jsonl"
        until(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, *processes)
        nodes.ip("-n", names[1], "link", "set", "eth0", "down")
        codes, texts = ended(processes)
    assert codes == [launch.STOPPED] * 2, texts
    for rank, text in enumerate(texts):
        assert f"fastdisco: error: rank {rank} on " in text, text
        assert "as are all ranks: the network between them is cut" in text, text


@pytest.mark.slow
def test_torchrun_restarts_under_gloo(folder, tmp_path):
    # The first attempt's rank 1 dies before its first step.
    dies = """
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    from fastdisco.data import TrainLoader
    TrainLoader.__next__ = lambda self: os.kill(os.getpid(), 9)
elif os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" and os.environ["RANK"] == "0":
    # Long enough for the other one to look for its address.
    time.sleep(40)
"""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    how = ["--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    arguments = tiny(folder, tmp_path, "run.max_steps=3", "data.val=null")
    command = [sys.executable, "-m", "torch.distributed.run", *how, script, dies, *arguments]
    text = run(*command, env={"PYTHONPATH": str(ROOT)})
    assert "done: 3 steps" in text, text
