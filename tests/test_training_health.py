"""How healthy the features are, beside the kNN accuracy during training: the names, the numbers of
`fastdisco eval health`, what there is without labels and without a teacher's file, and the warning."""

import contextlib
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ranks, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from training import _told, _train, losses, metrics, train_a_teacher

from fastdisco import cli, config, data, engine
from fastdisco.common import dist
from fastdisco.evals import health
from fastdisco.evals.features import Features
from fastdisco.run import log
from fastdisco.run.online import Online

ALWAYS = {"eval/feature_std", "eval/effective_rank", "eval/uniformity"}
TEACHERS = {"eval/teacher_cosine", "eval/teacher_cka", "eval/teacher_neighbours"}
LABELS = {"eval/knn_top1", "eval/alignment"}
# What each is called by `fastdisco eval health`.
THEIRS = {"eval/effective_rank": "eval/rankme"}


def passed(args):
    """Trains; returns the passes of evaluations as (folder, images) and what was said."""
    found, before = [], data.EvalLoader.__iter__

    def counted(self):
        found.append((self.listing.root.name, len(self.indices)))
        return before(self)

    data.EvalLoader.__iter__ = counted
    return found, _told(args)


def evaluated(folder, *more):
    """What `fastdisco eval health` finds for a run."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        log.console.file = out
        assert cli.main(["eval", "health", str(folder), *map(str, more)]) == 0
    return json.loads(out.getvalue().splitlines()[-1])


def scores(folder):
    return [m for m in metrics(folder) if any(k.startswith("eval/") for k in m)]


def agree(row, found, names):
    """The numbers of training are those of the command."""
    for name in names - {"eval/knn_top1"}:
        assert row[name] == pytest.approx(found[THEIRS.get(name, name)], rel=1e-4), name


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    train_a_teacher(folder, out, steps=1)
    return out


def student(folder, out, name, *more):
    """Learns from a run of ours; its teacher's architecture stands in the configuration alone."""
    teacher = f"teacher.file={out}/teacher", "teacher.arch=test_resnet"
    return tiny(folder, out, f"run.name={name}", "run.max_steps=2", *teacher, *more)


def test_the_numbers_are_those_of_the_command_from_the_same_pass(folder, out):
    ((found, said),) = ranks(1, passed, student(folder, out, "both", "eval.every=1"))
    # Bank and validation images for each evaluation; the teacher sees the latter once.
    assert sorted(found) == [("train", 43)] * 2 + [("val", 12)] * 3
    first, last = scores(out / "both")
    names = {k for k in first if k.startswith("eval/")}
    assert names == ALWAYS | TEACHERS | LABELS == {k for k in last if k.startswith("eval/")}
    agree(last, *ranks(1, evaluated, out / "both"), names)
    assert first["eval/effective_rank"] != last["eval/effective_rank"]
    assert f"effective rank {last['eval/effective_rank']:.1f}  neighbours shared" in said
    events = EventAccumulator(str(out / "both/tb"))
    events.Reload()
    for name in names:
        assert [e.value for e in events.Scalars(name)] == pytest.approx([first[name], last[name]])
    # The evaluations, with the teacher read anew, move no random number of the training's.
    ranks(1, _train, student(folder, out, "seldom"))
    assert losses(out / "seldom") == losses(out / "both") and len(scores(out / "seldom")) == 1


def test_images_of_one_class_have_no_accuracy_but_the_teachers_neighbours(folder, out, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "unlabelled").mkdir(parents=True)
        for path in (folder / part).rglob("*.jpg"):
            shutil.copy(path, tmp_path / part / "unlabelled" / f"{path.parent.name}{path.name}")
    ((found, said),) = ranks(1, passed, student(tmp_path, out, "unlabelled"))
    assert found == [("val", 12)] * 2
    (row,) = scores(out / "unlabelled")
    names = {k for k in row if k.startswith("eval/")}
    assert names == ALWAYS | TEACHERS and "kNN" not in said
    assert 0 < row["eval/teacher_neighbours"] <= 1
    agree(row, *ranks(1, evaluated, out / "unlabelled"), names)
    # A folder of images alone serves the command, too.
    flat = f"data.val={tmp_path}/val/unlabelled"
    agree(row, *ranks(1, evaluated, out / "unlabelled", flat, f"--out={tmp_path}"), names)


def test_a_run_without_validation_images_is_evaluated_afterwards_on_training_images(folder, out):
    ((found, _),) = ranks(1, passed, student(folder, out, "none", "data.val=null"))
    assert found == [] == scores(out / "none")
    names = {*ALWAYS, *TEACHERS, "eval/alignment"}
    (values,) = ranks(1, evaluated, out / "none")
    assert values.keys() >= {THEIRS.get(n, n) for n in names}
    # The same as of those images by name.
    train = f"data.val={folder}/train", f"--out={out}/named"
    assert ranks(1, evaluated, out / "none", *train) == [values]


def test_a_teacher_that_is_gone_is_said_once_and_the_rest_logged(folder, out, tmp_path):
    shutil.copytree(out / "teacher", tmp_path / "teacher")
    cache = f"teacher.cache_folder={tmp_path}/cache"
    args = student(folder, tmp_path, "recorded", cache, "teacher.cache=record", "eval.every=1")
    ranks(1, _train, args)
    (before, _) = scores(tmp_path / "recorded")
    assert before.keys() > TEACHERS
    shutil.rmtree(tmp_path / "teacher")
    args = student(folder, tmp_path, "replayed", cache, "teacher.cache=replay", "eval.every=1")
    (said,) = ranks(1, _told, args)
    assert said.count("the evaluations say nothing of the teacher: ") == 1
    (row, _) = scores(tmp_path / "replayed")
    assert {k for k in row if k.startswith("eval/")} == ALWAYS | LABELS
    for name in ALWAYS | LABELS:
        assert row[name] == before[name]


def test_a_training_that_collapses_is_told_what_to_look_at(folder, tmp_path):
    # lr x weight decay is 1: the first step leaves no weights.
    args = tiny(folder, tmp_path, "run.max_steps=1", "optim.weight_decay=20")
    (said,) = ranks(1, _told, args)
    assert said.count("the features collapse: they hardly tell images apart") == 1
    assert "at feat/std and the losses for the step where they fell, and lower optim.lr" in said
    (row,) = scores(tmp_path / "tiny")
    assert row["eval/feature_std"] < 0.01 and row["eval/effective_rank"] < 2


# ---- without a training


def an_online(few, **more):
    cfg = config.validate(
        {
            "run": {"name": "x"},
            "data": {"train": "a"},
            "views": [{"count": 2}],
            "method": {"name": "moco", "distill": 0, "contrast": 1},
            **more,
        },
        "test",
    )
    return Online(cfg, few, few, torch.device("cpu"))


def some(few, std=1.0, seed=0):
    """Features of all images around one direction, and a network with a head."""
    x = torch.randn(43, 16, generator=torch.Generator().manual_seed(seed))
    x = F.normalize(torch.ones(16), dim=0) * 4 + std * x
    return Features(x, torch.from_numpy(few.labels), torch.arange(43))


NET = SimpleNamespace(head=lambda f: f[:, :4])


def test_the_warning_is_not_repeated_until_the_features_were_well(few, capsys):
    o = an_online(few)
    said = []
    for std in (1, 1e-3, 1e-4, 1, 1e-3, 0):
        found = o.health("", NET, some(few, std))
        assert all(torch.tensor(v).isfinite() for v in found.values())
        said.append(capsys.readouterr().out.count("the features collapse"))
    assert said == [0, 1, 0, 0, 1, 0]
    # Each student has its own.
    o.health("small", NET, some(few, 0))
    assert "small: the features collapse" in capsys.readouterr().out


def test_features_along_one_line_have_collapsed_although_they_differ(few, capsys):
    f = some(few)
    line = torch.linspace(-0.25, 0.25, 43)[:, None] * torch.eye(16)[1]
    found = an_online(few).health("", NET, f._replace(x=torch.eye(16)[0] + line))
    assert found["feature_std"] > 0.03 and found["effective_rank"] < 2
    assert "the features collapse" in capsys.readouterr().out


def test_healthy_features_are_not_warned_of(few, capsys):
    an_online(few).health("", NET, some(few))
    assert capsys.readouterr().out == ""


def test_features_that_are_no_numbers_are_said_and_not_logged(few, capsys):
    f = some(few)
    f.x[3, 2] = torch.nan
    assert an_online(few).health("", NET, f) == {}
    assert "the features of 1 of 43 images are no finite numbers" in capsys.readouterr().out


def test_of_many_images_some_of_every_class_are_looked_at():
    found = health.sample(torch.arange(50_000).numpy())
    assert len(found) == 5000 and set(found // 50) == set(range(1000))
    assert health.sample(found[:7]).tolist() == found[:7].tolist()


def on_a_rank(few):
    """The numbers of a rank's own part of the features."""
    engine.start(config.Engine())
    f = some(few)
    return an_online(few).health("", NET, f.take(torch.arange(dist.rank(), 43, dist.world())))


def test_two_ranks_find_what_one_finds(few):
    one = an_online(few).health("", NET, some(few))
    for found in ranks(2, on_a_rank, few):
        assert found == pytest.approx(one)
