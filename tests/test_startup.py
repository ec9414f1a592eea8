"""bench/startup.py: its arms are the real commands, and a clock stops where it says."""

import sys

import pytest
from conftest import ROOT

from fastdisco import data

sys.path.insert(0, str(ROOT / "bench"))

import startup

SAYS_AND_WAITS = "import time; print('one', flush=True); time.sleep(0.5); print('two')"


def test_the_clock_stops_at_the_line_or_at_the_end(monkeypatch):
    clock = []
    monkeypatch.setattr(startup.time, "perf_counter", lambda: clock.append(None) or len(clock))
    # Read when the process starts and at the first line that has the words, not at later ones.
    assert startup.until_line(("-c", "print('a b'); print('b'); print('b')"), "b") == 1
    assert len(clock) == 2
    assert startup.until_end(("-c", "print('b')"), 0, "b") == 1
    monkeypatch.undo()
    assert startup.until_end(("-c", SAYS_AND_WAITS), 0, "two") >= 0.5


@pytest.mark.parametrize("program", ["print('a')", "print('b'); raise SystemExit(1)"])
def test_a_command_that_does_something_else_is_no_measurement(program):
    for until in (lambda x: startup.until_line(x, "b"), lambda x: startup.until_end(x, 0, "b")):
        with pytest.raises(AssertionError, match="-c"):
            until(("-c", program))


def test_the_arms_run(tmp_path, monkeypatch):
    assert startup.help_() > 0 and startup.wrong_key() > 0
    startup.images(tmp_path / "images")
    listings = [data.listing(tmp_path / "images" / part) for part in ("train", "val")]
    assert [len(x.files) for x in listings] == [43, 12] and len(listings[0].classes) == 3
    # The first step's command is right up to where it would start.
    command = []
    monkeypatch.setattr(startup, "until_line", lambda c, says: command.append(c) or 1.0)
    assert startup.first_step(tmp_path) == 1.0
    plan = [x for x in command[0] if x != "--overwrite"]
    assert startup.until_end((*plan, "--dry-run"), 0, "missing     nothing") > 0


def test_a_round_that_fills_the_caches_does_not_count(tmp_path, monkeypatch):
    calls = []
    for name, seconds in (("help_", 1.0), ("wrong_key", 2.0), ("first_step", 3.0)):
        monkeypatch.setattr(startup, name, lambda *_, s=seconds: calls.append(s) or s + len(calls))
    samples = startup.measure(tmp_path, 2)
    assert samples.keys() == startup.AIMS.keys() and calls == [1.0, 2.0, 3.0] * 3
    assert samples == {"help_s": [5, 8], "wrong_key_s": [7, 10], "first_step_s": [9, 12]}
