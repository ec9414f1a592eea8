"""Ctrl-C and SIGTERM reach an evaluation where it computes without reading images."""

import signal

import pytest
from conftest import ranks
from test_eval_command import a_run

from fastdisco import cli
from fastdisco.common import dist
from fastdisco.evals import logistic, neighbours, retrieve
from fastdisco.evals.linear import Heads


@pytest.fixture(scope="module")
def run(textures, tmp_path_factory):
    return a_run(textures, tmp_path_factory.mktemp("runs"))


def signalled(owner, name, at, number=signal.SIGTERM):
    """Counts the calls of a function; the signal reaches this process in one of them."""
    calls, before = [0], getattr(owner, name)

    def counted(*args, **more):
        calls[0] += 1
        if calls[0] == at:
            signal.raise_signal(number)
        return before(*args, **more)

    setattr(owner, name, counted)
    return calls


def stopped(what, run, out, *more):
    return cli.main(["eval", what, str(run), f"--out={out}", *more])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_logistic_regression_stops_between_two_steps(run, tmp_path, monkeypatch, capsys, number):
    # Put back at the end, whatever is in its place then.
    monkeypatch.setattr(logistic, "_objective", logistic._objective)
    calls = signalled(logistic, "_objective", 5, number)
    assert stopped("probe", run, tmp_path, "probe.kinds=logistic", "probe.held=0.1") == 75
    assert calls == [5] and "stopped as asked" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))


def test_sgd_on_features_stops_between_two_epochs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Heads, "step", Heads.step)
    calls = signalled(Heads, "step", 1)
    more = "probe.kinds=sgd", "probe.held=0.1", "probe.epochs=9", "probe.batch=60"
    assert stopped("probe", run, tmp_path, *more) == 75 and calls == [1]


def test_neighbours_stop_between_two_pieces(run, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "QUERIES", 4)
    monkeypatch.setattr(neighbours, "nearest", neighbours.nearest)
    calls = signalled(neighbours, "nearest", 2)
    assert stopped("knn", run, tmp_path) == 75 and calls == [2]


def test_retrieval_stops_between_two_pieces(run, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieve, "CELLS", 60)
    monkeypatch.setattr(retrieve, "_sums", retrieve._sums)
    calls = signalled(retrieve, "_sums", 2)
    assert stopped("retrieve", run, tmp_path) == 75 and calls == [2]


def on_a_rank(run, out):
    """The signal reaches one of the ranks."""
    dist.defaults()
    if dist.rank():
        signalled(logistic, "_objective", 5)
    return stopped("probe", run, out, "probe.kinds=logistic", "probe.held=0.1")


def test_of_two_ranks_both_stop(run, tmp_path):
    assert ranks(2, on_a_rank, run, tmp_path) == [75, 75]
