"""What an evaluation prints where no bar can move: what it begins, and how far a training is."""

from types import SimpleNamespace

import pytest
import torch

from fastdisco.commands import kept, measure
from fastdisco.commands.kept import Kept
from fastdisco.commands.measure import Work

NOT_STOPPED = SimpleNamespace(stop=None)


def begun():
    with Work.bar(NOT_STOPPED, "features of 3 images of val", 3) as tick:
        tick(3)


def test_a_log_says_what_begins(capsys):
    begun()
    assert capsys.readouterr().out == "features of 3 images of val\n"


def test_a_terminal_has_the_bar_instead(monkeypatch):
    said = []
    monkeypatch.setattr(measure, "say", said.append)
    console = measure.console
    monkeypatch.setattr(type(console), "is_terminal", property(lambda self: True))
    begun()
    assert said == []


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_log_says_with_each_save_how_far_a_training_is(monkeypatch, capsys, tmp_path, seconds):
    monkeypatch.setattr(kept, "SAVE", seconds)
    work = SimpleNamespace(
        network=SimpleNamespace(folder=tmp_path),
        device=torch.device("cpu"),
        stop=None,
        bar=lambda *args, **more: Work.bar(NOT_STOPPED, *args, **more),
    )
    training = SimpleNamespace(epoch=0, step=0, state_dict=lambda: {"epoch": training.epoch})
    state = Kept(work, "linear", {"a": 1}, training, "5 classifiers", 3)
    with state:
        for epoch in range(3):
            # Within an epoch, then at its end.
            training.epoch, training.step = epoch, 7
            state.watch(training)
            training.epoch, training.step = epoch + 1, 0
            state.watch(training)
    lines = capsys.readouterr().out.splitlines()
    done = [f"linear: epoch {n} of 3 done" for n in (1, 2, 3)] if seconds == 0 else []
    assert lines == ["linear: 5 classifiers, 3 epochs", *done]
    assert state.path.exists() == (seconds == 0)
