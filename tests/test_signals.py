"""Signals and dying launchers: every rank saves, ends, and can be started again."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import HANGS, ROOT, launcher, ranks, tiny

from fastdisco import models
from fastdisco.common import launch
from fastdisco.run import checkpoint
from fastdisco.run.signals import Stop

SCRIPT = ROOT / "fastdisco/train.py"

# A rank as far as the launcher is concerned: says its number, then waits.
RANK = """
import os, time
from fastdisco.common import launch
launch.follow()
print(os.getpid(), flush=True)
time.sleep(3600)
"""
# Starts its arguments, says its own number, and waits for them.
STARTER = """
import os, subprocess, sys
p = subprocess.Popen(sys.argv[1:])
print(os.getpid(), flush=True)
p.wait()
"""


@contextlib.contextmanager
def tree(tmp_path, *names):
    """{name: pid} of processes that start each other, with the rank as the last, "rank"."""
    command = [sys.executable, "-c", RANK]
    for name in reversed(names):
        (tmp_path / name).write_text(STARTER)
        command = [sys.executable, str(tmp_path / name), *command]
    top = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(top.stdout.readline()) for _ in (*names, "rank")]
    # Who speaks first is open, but who started whom is not.
    parents = {pid: launch.process(pid)[1] for pid in pids}
    order = [top.pid]
    while len(order) < len(pids):
        order.append(next(x for x in pids if parents[x] == order[-1]))
    try:
        yield dict(zip((*names, "rank"), order))
    finally:
        for pid in order:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        top.communicate()


def gone(pid):
    """Waits for a process to end; False if it has not in the time after which a test hangs."""
    end = time.monotonic() + HANGS
    while (alive := launch.process(pid)) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive


@pytest.mark.parametrize(
    "names, dies",
    [
        (("torchrun",), "torchrun"),
        (("deepspeed",), "deepspeed"),
        (("deepspeed", "torchrun"), "deepspeed"),
        (("shell", "deepspeed"), "deepspeed"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_does_not_outlive_its_launchers(names, dies, number, tmp_path):
    with tree(tmp_path, *names) as pids:
        os.kill(pids[dies], number)
        assert gone(pids["rank"])


@pytest.mark.parametrize("names", [("shell",), ("shell", "deepspeed")])
def test_a_rank_outlives_a_shell(names, tmp_path, monkeypatch):
    # As after `nohup deepspeed ... &` and a logout.
    with tree(tmp_path, *names) as pids:
        os.kill(pids["shell"], signal.SIGKILL)
        time.sleep(3 * launch._LOOK)
        assert launch.process(pids["rank"])


def test_the_real_launchers_are_recognised():
    command = [*launcher(1), "--no_python", "--no_local_rank", sys.executable, "-c", RANK]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as top:
        pid = next(int(x) for x in top.stdout if x.strip().isdecimal())
        top.terminate()
        assert gone(pid)
        top.communicate()


def _asked(number):
    torch.distributed.init_process_group("gloo")
    stop, seen = Stop(), []
    for step in range(6):
        if step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        seen.append(stop.agreed())
    stop.finish()
    return seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_one_rank_is_asked_and_all_stop_one_step_later(number):
    assert ranks(2, _asked, number) == [[False] * 3 + [True] * 3] * 2


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.parametrize("start", ["deepspeed", "torchrun"])
def test_sigterm_to_the_launcher_saves_and_ends_every_rank(start, folder, tmp_path):
    # Looks at its log points alone, far apart, would come too late.
    more = ("run.epochs=100000", "log.every=1000000", "data.val=null")
    args = [str(x) for x in tiny(folder, tmp_path, *more)]
    run, path = tmp_path / "tiny", tmp_path / "out.txt"
    with path.open("w") as out:
        starter = launcher(2) if start == "deepspeed" else TORCHRUN
        command = [*starter, SCRIPT, *args, "checkpoint.every=3"]
        top = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    try:
        while top.poll() is None and not (run / "checkpoints/last").exists():
            time.sleep(0.05)
        assert top.poll() is None, path.read_text()
        alive = [int(p) for p in os.listdir("/proc") if p.isdecimal() and _names(p, tmp_path)]
        trained = [p for p in alive if p != top.pid and not _names(p, "deepspeed.launcher")]
        assert len(trained) == 2
        top.terminate()
        assert all(gone(p) for p in trained)
    finally:
        top.kill()
        top.wait()
    text = path.read_text()
    # torchrun prints a traceback of its own that names the signal.
    assert "stopped as asked after step" in text, text
    assert start == "torchrun" or "Traceback" not in text, text
    step = int(text.split("stopped as asked after step ")[1].split(";")[0])
    assert models.read(checkpoint.last(run) / "state.pt")["step"] == step
    assert not (run / ".lock").exists()


def _names(pid, what):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", errors="replace") as f:
        return str(what) in f.read()
