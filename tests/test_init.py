"""The image's entry point, as process 1 of a process name space."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import HANGS, ROOT

INIT = ROOT / "docker/init.py"
# A launcher that ends at once on a signal, as deepspeed does, and its rank, which saves for a while.
LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(3600)
"""
RANK = """
import signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    print("saved after", signal.Signals(number).name, flush=True)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, save)
print("ready", flush=True)
while True:
    time.sleep(3600)
"""


def container(*command):
    """docker/init.py as process 1, or a skip where this user cannot have that."""
    space = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    try:
        subprocess.run([*space, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"root: no process name space can be made here ({e})")
    return subprocess.Popen(
        [*space, sys.executable, INIT, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first(process):
    """The number of the container's process 1, seen from outside."""
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    end = time.monotonic() + HANGS
    while time.monotonic() < end:
        with open(children) as file:
            if found := file.read().split():
                return int(found[0])
        time.sleep(0.02)
    raise AssertionError("no child")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_comes_to_the_ranks_which_end_in_peace(number):
    process = container(sys.executable, "-c", LAUNCHER, RANK)
    assert process.stdout.readline() == "ready\n"
    os.kill(first(process), number)
    out, err = process.communicate(timeout=HANGS)
    assert out == f"saved after {number.name}\n", err
    assert process.returncode == 75


def ended(*command):
    process = container(*command)
    return process.wait(HANGS), process.communicate()[1]


def test_the_commands_exit_code_is_the_containers():
    assert [ended("sh", "-c", f"exit {n}")[0] for n in (0, 2, 75)] == [0, 2, 75]


def test_a_command_that_a_signal_ends_tells_it_as_shells_do():
    assert ended("sh", "-c", "kill -9 $$")[0] == 137


def test_it_waits_for_what_its_command_leaves_behind():
    process = container("sh", "-c", "(sleep 0.5; echo late) & exit 0")
    assert process.communicate(timeout=HANGS)[0] == "late\n" and process.returncode == 0


def test_a_command_that_does_not_exist_is_named():
    code, said = ended("no-such-command")
    assert code == 127 and said == "docker/init.py: no-such-command: No such file or directory\n"


def test_it_need_not_be_process_1():
    process = subprocess.Popen(
        [sys.executable, INIT, sys.executable, "-c", LAUNCHER, RANK],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    out, _ = process.communicate(timeout=HANGS)
    assert out == "saved after SIGTERM\n" and process.returncode == 75
