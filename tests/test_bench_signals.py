"""bench/signals.py: what is too little to be a percentile has no value."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import signals


def samples(seconds, load):
    return {"signals": [{"seconds": x} for x in seconds], "load": [load] * len(seconds)}


@pytest.mark.parametrize(
    "seconds, load, value, why",
    [
        ([1.0] * 99, 0.1, None, "99 signals were sent; a 99th percentile needs 100"),
        ([1.0] * 100, 1e6, None, "others used the"),
        ([*range(1, 101)], 0.1, 99.01, None),
    ],
)
def test_the_row(seconds, load, value, why):
    row = signals.summary(samples(seconds, load))
    assert (row["name"], row["value"], row["aim"]) == ("sigterm_p99_s", value, 10.0)
    assert why is None or why in row["reason"]


def test_processes_below_are_found():
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", inner], stdin=subprocess.PIPE) as top:
        while not (found := signals.below(top.pid)):
            assert top.poll() is None
        assert all(map(signals.alive, [top.pid, *found])) and top.pid in signals.below(os.getpid())
        top.communicate()
    assert not any(map(signals.alive, [top.pid, *found]))
