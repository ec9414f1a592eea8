"""The evaluation during a training: the checkpoint comes first, and a failing one loses nothing."""

import json
import shutil

import pytest
import torch
from conftest import ranks, tiny
from training import _fails, _told, losses, metrics

from fastdisco.common.errors import UserError
from fastdisco.evals import knn
from fastdisco.run import checkpoint, evaluation


@pytest.fixture(scope="module")
def broken(folder, tmp_path_factory):
    """The images, one of those for validation damaged."""
    root = tmp_path_factory.mktemp("broken")
    shutil.copytree(folder, root, dirs_exist_ok=True)
    next((root / "val/class1").iterdir()).write_bytes(b"\xff\xd8 no image")
    return root


def _order(args):
    """Trains; returns what was said, and whether each evaluation had its step's checkpoint."""
    seen, evaluate = [], evaluation.evaluate

    def watched(*rest):
        seen.append(len(list(checkpoint_folder.glob("step_*"))))
        return evaluate(*rest)

    checkpoint_folder = args[-1]
    evaluation.evaluate = watched
    return _told(args[:-1]), seen


@pytest.mark.parametrize("n", [1, 2])
def test_a_failing_evaluation_is_told_and_the_training_goes_on(n, folder, broken, tmp_path):
    # Not beside the training, so that what is there can be counted.
    more = ("run.max_steps=4", "eval.every=2", "checkpoint.every=2", "checkpoint.keep=9")
    more += ("checkpoint.background=false",)
    (text, seen), *_ = ranks(
        n, _order, [*tiny(broken, tmp_path, *more), tmp_path / "tiny/checkpoints"]
    )
    assert seen == [1, 2]
    for step in (2, 4):
        assert text.count(f"step {step}: not evaluated, and the training goes on") == 1
    assert "unreadable image" in text and "class1" in text and "done: 4 steps" in text
    assert not any("eval/knn_top1" in row for row in metrics(tmp_path / "tiny"))
    # The training itself is not another one.
    ranks(n, _told, tiny(folder, tmp_path / "whole", *more, "eval.every=0"))
    assert losses(tmp_path / "tiny") == losses(tmp_path / "whole/tiny")


def test_a_setting_makes_it_fatal_and_the_steps_are_kept(broken, tmp_path):
    args = tiny(broken, tmp_path, "run.max_steps=4", "eval.every=2", "checkpoint.every=2")
    code, error = ranks(1, _fails, [*args, "eval.fatal=true"])[0]
    assert code == 2 and "unreadable image" in error
    assert checkpoint.last(tmp_path / "tiny").name == "step_00000002"


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(folder, tmp_path):
    args = tiny(folder, tmp_path, "run.max_steps=3", "run.seed=1")
    ranks(1, _told, args)
    path = tmp_path / "tiny/metrics.jsonl"
    rows = metrics(tmp_path / "tiny")
    assert "eval/knn_top1" in rows[-1]
    # As after a kill between checkpoint and evaluation.
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    ranks(1, _told, args)
    again = metrics(tmp_path / "tiny")
    assert again[:-1] == rows[:-1]
    assert again[-1]["step"] == 3 and again[-1]["eval/knn_top1"] == rows[-1]["eval/knn_top1"]


def _few():
    torch.distributed.init_process_group("gloo")
    view = torch.randn(1, 3, 2, 2)
    batch = type("Batch", (), dict(views=[view], label=torch.zeros(1, dtype=torch.long)))
    mine = [batch] if torch.distributed.get_rank() == 0 else []
    try:
        return knn.run(lambda x: x.flatten(1), [batch], mine, 1)
    except UserError as e:
        return str(e)


def test_fewer_images_than_ranks_are_every_ranks_error():
    first, second = ranks(2, _few)
    assert first == second and "fewer than 2 ranks" in first
