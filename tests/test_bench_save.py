"""bench/save.py: what a save costs is what the training loses, and a busy machine gives no value."""

import sys
import types

import pytest
import torch
from conftest import ROOT, ranks

from fastdisco import config, engine
from fastdisco.run import checkpoint

sys.path.insert(0, str(ROOT / "bench"))

import save


def test_lost_is_what_the_window_is_longer_than_its_steps():
    # Half a second a step without a save; a window of 10 steps takes 6.2 s with one, 1.2 s too long.
    windows = {
        "none": [save.Window(4.0, 8, 0.0)] * 3,
        "background": [save.Window(6.2, 10, 0.1)] * 3,
        "waiting": [[8.0, 10, 3.0]] * 3,
    }
    assert save.lost(windows, "background") == pytest.approx([1.2] * 3)
    values = {x["name"]: (x["value"], x["aim"]) for x in save.rows("r50", windows, None)}
    assert values == {
        "save_stall_share_r50": (0.02, 0.02),
        "save_stall_r50_s": (0.1, None),
        "save_stall_share_r50_waiting": (0.05, None),
        "save_stall_r50_waiting_s": (3.0, None),
    }
    busy = save.rows("mobv3", windows, save.busy(1e6))
    assert [x["value"] for x in busy] == [None] * 4 and "a load of 1000000" in busy[0]["reason"]
    assert busy[0]["name"] == "save_stall_share" and save.busy(0.0) is None


def test_a_window_lasts_until_the_checkpoint_is_on_disk(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(save, "now", lambda device: clock[0])
    monkeypatch.setattr(save.time, "perf_counter", lambda: clock[0])

    class Slow:
        left = 9.0

        def save(self, step, ends):
            clock[0] += 2

        @property
        def busy(self):
            return clock[0] < 2 + self.left

        def wait(self):
            clock[0] += 100

    def step():
        clock[0] += 1

    training = types.SimpleNamespace(device=torch.device("cpu"), done=0, step=step)
    assert save.window(training, Slow(), 4.0) == (11.0, 9, 2.0)
    assert save.window(training, None, 4.0) == (4.0, 4, 0.0)


def _arms(run):
    engine.start(config.Engine())
    training = save.Training("test_efficientnet", 4, 32, run, torch.device("cpu"))
    before = [p.clone() for p in training.state.net.parameters()]
    found = save.measure(training, 2, 0.0)
    moved = not all(map(torch.equal, before, training.state.net.parameters()))
    return found, moved


def test_the_arms_run(tmp_path):
    ((found, moved),) = ranks(1, _arms, tmp_path)
    assert {name: len(x) for name, x in found.items()} == dict.fromkeys(save.ARMS, 2) and moved
    assert all(x.stall > 0 for arm in ("background", "waiting") for x in found[arm])
    assert all(x.steps for windows in found.values() for x in windows)
    state = torch.load(checkpoint.last(tmp_path) / "state.pt", weights_only=True)
    assert len(state["method"]["queue.rows"]) == 65536 and state["optimizer"]["parameters"]
