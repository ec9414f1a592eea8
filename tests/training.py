"""Trainings in ranks of their own, and what they leave: what the tests of the command share."""

import contextlib
import io
import json

import torch
from conftest import ROOT, ranks, tiny

from fastdisco import cli, config, models
from fastdisco.commands import train
from fastdisco.run import checkpoint, log

SCRIPT = ROOT / "fastdisco/train.py"


def metrics(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return {m["step"]: m["train/loss"] for m in metrics(folder) if "train/loss" in m}


def _train(args):
    code = train.main([str(a) for a in args])
    assert code == 0, f"ended with {code}"


def train_a_teacher(folder, out, steps):
    """Trains a small network of our own, for students to distil from, into out/teacher."""
    small = ("run.name=teacher", "student.arch=test_resnet", "student.kwargs={}")
    ranks(1, _train, tiny(folder, out, f"run.max_steps={steps}", *small))


def _told(args):
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        log.console.file = out
        _train(args)
    return out.getvalue()


def _fails(args):
    """(exit code, what the command says of the error)"""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = train.main([str(a) for a in args])
    return code, "".join(x for x in err.getvalue().splitlines(True) if x.startswith("fastdisco"))


def command(*words):
    """(exit code, stdout, stderr) of a command of fastdisco's in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            ended = cli.main([str(x) for x in words])
        except SystemExit as e:
            ended = e.code
    return ended, out.getvalue(), err.getvalue()


def _knn(folder):
    """What `fastdisco eval knn` finds for a run."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["eval", "knn", str(folder)]) == 0
    return json.loads(out.getvalue().splitlines()[-1])["eval/knn_top1"]


def _differences(folder_a, folder_b, n, logged=range(1, 15)):
    """Names of what two finished runs do not have bit-equal."""
    found = []
    for file in ["state.pt"] + [f"rank_{r}.pt" for r in range(n)]:
        a, b = (
            config.flatten(models.read(checkpoint.last(f) / file)) for f in (folder_a, folder_b)
        )
        assert a.keys() == b.keys()
        found += [
            f"{file}:{k}"
            for k in a
            if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])
        ]
    a, b = losses(folder_a), losses(folder_b)
    assert sorted(a) == sorted(b) == list(logged)
    return found + [f"loss:{s}" for s in a if a[s] != b[s]]
