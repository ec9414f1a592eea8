"""Several students in one run: each trains as it would alone, on one batch and one forward of the
teacher; resuming, evaluating, refusing."""

import contextlib
import io
import json

import pytest
import torch
from conftest import ranks, tiny
from training import _train, metrics, train_a_teacher

from fastdisco import cli, config, models, teacher
from fastdisco.config import UserError
from fastdisco.run import checkpoint, students
from fastdisco.teacher import Teacher

STEPS, HALF = 6, 3
PAIR = "students=[{arch: test_efficientnet}, {name: small, arch: test_resnet, hidden: 4, kwargs: {}, lr: 0.1}]"
ALONE = {
    "test_efficientnet": [],
    "small": ["student.arch=test_resnet", "student.hidden=4", "student.kwargs={}", "optim.lr=0.1"],
}


def _args(folder, out, name, *more):
    """Distilled from a run of ours, without dropout, whose random numbers the two would share."""
    return tiny(
        folder,
        out,
        f"run.name={name}",
        f"run.max_steps={STEPS}",
        f"teacher.file={out}/teacher",
        "teacher.arch=test_resnet",
        "student.kwargs={}",
        *more,
    )


def _counted(args):
    """Trains; returns how often the teacher ran."""
    calls, forward = [], Teacher.__call__

    def call(self, views):
        calls.append(len(views))
        return forward(self, views)

    Teacher.__call__ = call
    _train(args)
    return calls


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    """Of 2 ranks: both/, each student alone under its name, halves/ stopped and continued."""
    out = tmp_path_factory.mktemp("students")
    train_a_teacher(folder, out, steps=2)
    # Both views, once a batch.
    assert ranks(2, _counted, _args(folder, out, "both", PAIR)) == [[2] * STEPS] * 2
    for name, overrides in ALONE.items():
        ranks(2, _train, _args(folder, out, name, *overrides))
    for steps in (HALF, STEPS):
        ranks(2, _train, _args(folder, out, "halves", PAIR, f"run.max_steps={steps}"))
    return out


def _files(run):
    return [
        config.flatten(models.read(checkpoint.last(run) / file))
        for file in ("state.pt", "rank_0.pt", "rank_1.pt")
    ]


def _same(x, y):
    return torch.equal(x, y) if torch.is_tensor(x) else x == y


@pytest.mark.parametrize("name", ALONE)
def test_each_trains_as_it_would_alone_to_the_last_bit(out, name):
    together = [m for m in metrics(out / "both") if f"train/{name}/loss" in m]
    alone = [m for m in metrics(out / name) if "train/loss" in m]
    assert len(together) == len(alone) == STEPS
    for a, b in zip(together, alone):
        for key in (
            "train/loss",
            "train/loss_contrast",
            "train/loss_distill",
            "train/lr",
            "feat/std",
            "distill/cosine",
        ):
            group, rest = key.split("/")
            assert a[f"{group}/{name}/{rest}"] == b[key]
    for both, one in zip(_files(out / "both"), _files(out / name)):
        shared = {
            k for k in one if k.split(".")[0] in ("step", "meta", "data", "world", "rank", "rng")
        }
        assert {k for k in both if k.startswith(f"{name}/")} == {
            f"{name}/{k}" for k in set(one) - shared
        } and len(one) > len(shared)
        assert [k for k in set(one) - shared if not _same(one[k], both[f"{name}/{k}"])] == []


def test_the_two_are_not_the_same_student(out):
    last = metrics(out / "both")[-2]
    assert (
        last["train/small/loss"] != last["train/test_efficientnet/loss"]
        and last["train/small/lr"] == 2 * last["train/test_efficientnet/lr"]
    )


def test_a_stopped_run_goes_on_exactly(out):
    for a, b in zip(_files(out / "both"), _files(out / "halves")):
        assert a.keys() == b.keys() and [k for k in a if not _same(a[k], b[k])] == []


def test_each_is_evaluated_and_found_by_its_name(out, capsys):
    scores = next(m for m in metrics(out / "both") if "eval/small/knn_top1" in m)
    assert metrics(out / "small")[-1]["eval/knn_top1"] == scores["eval/small/knn_top1"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert cli.main(["eval", "knn", str(out / "both"), "--student", "small"]) == 0
    assert (
        json.loads(text.getvalue().splitlines()[-1])["eval/knn_top1"]
        == scores["eval/small/knn_top1"]
    )
    # Overrides after an option, too.
    for command in (
        ["--student", "small", "eval.k=0"],
        ["eval.bank=100", "--student", "small", "eval.k=0"],
    ):
        assert cli.main(["eval", "knn", str(out / "both"), *command]) == 2
        assert "eval.k" in capsys.readouterr().err
    net, cfg = models.from_run(out / "both", "ema", student="small")
    assert cfg.student.arch == "test_resnet" and cfg.optim.lr == 0.1 and cfg.students == ()
    assert torch.equal(
        net.state_dict()["head.0.weight"],
        models.read(checkpoint.last(out / "small") / "state.pt")["ema"]["head.0.weight"],
    )
    taught = teacher.load(out / "both", "test_resnet", {}, 8, student="small")
    assert taught.fingerprint == teacher.load(out / "small", "test_resnet", {}, 8).fingerprint


@pytest.mark.parametrize(
    "run, student, says",
    [
        ("both", None, "several students.*test_efficientnet, small"),
        ("both", "tall", "no student tall"),
        ("small", "small", "single one"),
    ],
)
def test_a_name_that_does_not_fit_the_run_is_refused(out, run, student, says):
    with pytest.raises(UserError, match=says):
        models.from_run(out / run, student=student)


def _validated(*students):
    return config.validate(
        {"run": {"name": "a"}, "data": {"train": "x"}, "students": list(students)}, "test"
    )


def test_what_is_not_said_is_the_common_blocks():
    cfg = config.students(
        _validated({"arch": "resnet18", "lr": 0.5}, {"name": "wide", "hidden": 9})
    )
    assert [(c.student.arch, c.student.hidden, c.optim.lr) for c in cfg.values()] == [
        ("resnet18", 2048, 0.5),
        ("mobilenetv3_large_100", 9, 0.03),
    ]
    assert list(cfg) == ["resnet18", "wide"] and list(config.students(_validated())) == [""]


@pytest.mark.parametrize(
    "students, says",
    [
        (
            [{"arch": "resnet18"}, {"arch": "resnet18", "hidden": 9}],
            "students: 2 are named resnet18",
        ),
        ([{"arch": "resnet18", "name": "a"}, {"name": "a"}], "students: 2 are named a"),
        ([{"name": "a/b"}], "students.0.name"),
        ([{"archh": "resnet18"}], "unknown key students.0.archh; did you mean students.0.arch"),
    ],
)
def test_what_makes_no_sense_is_refused(students, says):
    with pytest.raises(UserError, match=says):
        _validated(*students)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_keeps_the_students_apart(folder, tmp_path, stage):
    for name, more in (("both", [PAIR]), ("small", ALONE["small"])):
        ranks(
            2,
            _train,
            tiny(
                folder,
                tmp_path,
                f"run.name={name}",
                "run.max_steps=3",
                "student.kwargs={}",
                f"engine.stage={stage}",
                "engine.precision=bf16",
                *more,
            ),
        )
    together, alone = (
        [m[key] for m in metrics(tmp_path / run) if key in m]
        for run, key in (("both", "train/small/loss"), ("small", "train/loss"))
    )
    assert together == alone and len(alone) == 3


def test_the_teachers_answer_is_kept_for_one_batch_only():
    calls = []
    shared = students.once(lambda views: calls.append(views) or len(calls))
    a, b = torch.zeros(1), torch.zeros(1)
    assert [shared([a, b]), shared([a, b]), shared([b]), shared([a, b])] == [1, 1, 2, 1]
    assert students.once(lambda views: 5)([a, b]) == 5
