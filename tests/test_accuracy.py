"""bench/accuracy.py: how long it makes its arms, what they share, what it says where one is
missing, and all of it on a few images."""

import argparse
import json
import sys
import time

import numpy as np
import pytest
import torch
from conftest import HANGS, ROOT
from PIL import Image

from fastdisco import config

sys.path.insert(0, str(ROOT / "bench"))
import accuracy
from comparison import arms, scores
from comparison.plan import fitting, planned
from harness import results

TINY = dict(
    teacher="resnet10t",
    teacher_lr=0.06,
    probe=4,
    cfg=arms.SHARED
    | dict(
        data=dict(batch=8, threads=1, eval_resize=32, eval_size=32, eval_batch=16),
        bn=dict(groups=2),
        log=dict(every=1),
        view=dict(size=32),
        student=dict(arch="mobilenetv3_small_050", hidden=16),
        method=dict(name="moco", queue=16, momentum=0.9),
        optim=arms.PLAIN,
    ),
)


def settings(name, tmp_path, preset="cpu", epochs=7):
    """An arm's whole configuration, flat."""
    chosen = accuracy.PRESETS[preset]
    base = tmp_path / "student.yaml"
    base.write_text(
        json.dumps(chosen["cfg"] | {"data": chosen["cfg"]["data"] | dict(train="/a", val="/b")})
    )
    return config.flatten(
        config.load(base, arms.arm_settings(tmp_path, chosen, name, 3, epochs)).model_dump(
            mode="json"
        )
    )


@pytest.mark.parametrize("preset", ["cpu", "gpu"], ids="preset {}".format)
def test_the_arms_share_every_setting_but_the_term(preset, tmp_path):
    alone, equal, disco, teacher = (
        settings(n, tmp_path, preset) for n in ("alone", "alone_equal_time", "disco", "teacher")
    )
    differ = lambda a, b: {k for k in a | b if a.get(k) != b.get(k)}
    assert differ(alone, equal) == {"run.name"}
    assert {k.split(".")[0] for k in differ(alone, disco) - {"run.name"}} == {"teacher"}
    assert differ(alone, teacher) <= {"run.name", "student.arch", "optim.lr"}
    assert (
        disco["teacher.arch"] == teacher["student.arch"]
        and disco["teacher.file"].endswith("/teacher")
        and teacher["run.name"] == "teacher"
    )
    assert (
        alone["teacher"] is None
        and alone["bn.groups"] > 1
        and alone["run.seed"] == 3
        and alone["run.epochs"] == 7
    )


def test_as_many_epochs_as_fit():
    seconds = dict(teacher=60.0, alone=30.0, disco=90.0)
    # An epoch: 2 x 60 of the teacher, 30 + 90 alone, DisCo, 90 for equal time, 90 for SEED.
    assert fitting(seconds, 70, 1) == 10
    assert fitting(seconds, 70, 3) == 4 and fitting(seconds, 0.1, 1) == 1


def test_a_plan_holds_for_all_calls(folder, tmp_path, monkeypatch):
    """What a later call leaves out is the plan's; what it says must be the plan's."""
    monkeypatch.setattr(accuracy, "arm", lambda *a: pytest.fail("the call went on"))
    file, call = (
        tmp_path / "plan.json",
        ["--preset", "cpu", "--data", str(folder), "--out", str(tmp_path)],
    )
    plan = dict(
        preset="cpu",
        data=str(folder),
        seeds=1,
        minutes=95.0,
        seconds_per_epoch={},
        epochs=4,
        teacher_epochs=8,
    )
    file.write_text(json.dumps(plan))
    for more, differ in [
        (["--epochs", "5"], "epochs"),
        (["--minutes", "90"], "minutes"),
        (["--seeds", "1", "2"], "seeds"),
        (["--epochs", "4", "--minutes", "95"], None),
        ([], None),
    ]:
        if differ:
            with pytest.raises(config.UserError, match=f"another {differ}"):
                accuracy.main([*call, *more])
        else:
            with pytest.raises(pytest.fail.Exception, match="the call went on"):
                accuracy.main([*call, *more])
    monkeypatch.undo()
    assert json.loads(file.read_text()) == plan


def test_without_a_word_a_plan_is_for_90_minutes(tmp_path):
    args = argparse.Namespace(preset="cpu", data=tmp_path, seeds=[0, 1], minutes=None, epochs=3)
    assert planned(tmp_path, tmp_path, TINY, args) == json.loads(
        (tmp_path / "plan.json").read_text()
    )
    assert json.loads((tmp_path / "plan.json").read_text()) == dict(
        preset="cpu",
        data=str(tmp_path),
        seeds=2,
        minutes=90,
        seconds_per_epoch={},
        epochs=3,
        teacher_epochs=6,
    )


@pytest.mark.parametrize(
    "given, want",
    [
        (["--data", "x/cifar10-jpeg.tar.xz", "--name", "cifar10"], "cifar10"),
        (["--data", "x/pets.tar.gz"], "pets"),
        (["--data", "x/pets"], "pets"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[1],
)
def test_rows_are_named_after_the_data(given, want, folder, tmp_path, monkeypatch):
    def no_time(*_):
        raise arms.Stopped("stopped")

    monkeypatch.setattr(accuracy, "images", lambda *_: folder)
    monkeypatch.setattr(accuracy, "arm", no_time)
    rows = accuracy.main([*given, "--epochs", "1", "--out", str(tmp_path)])
    assert rows[0]["name"] == f"disco_gain_points_{want}"


def test_minutes_are_those_of_training():
    lines = [
        {"step": 20, "perf/step_time": 3.0},
        {"step": 30, "perf/step_time": 6.0},
        {"step": 30, "eval/knn_top1": 0.5},
    ]
    assert arms.trained_minutes(lines) == 2.0


def test_a_run_is_finished_when_its_last_checkpoint_was_evaluated(tmp_path):
    assert not arms.finished(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last").write_text("step_00000020\n")
    evaluated = lambda step: {"step": step, "eval/knn_top1": 0.1}
    for lines, want in [
        ([{"step": 20}], False),
        ([{"step": 20}, evaluated(20)], True),
        ([evaluated(30)], False),
    ]:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        assert arms.finished(tmp_path) == want


def test_the_rows():
    score = lambda knn: dict(
        knn=knn, linear=knn + 0.1, untrained_knn=0.2, untrained_linear=0.25, minutes=1.0, epochs=1
    )
    rows = {
        r["name"]: r
        for r in accuracy.summary(
            {
                "teacher": [score(0.7)],
                "alone": [score(0.4), score(0.5)],
                "disco": [score(0.6), score(0.62)],
            },
            {"seed": "the time was up, too", "alone_equal_time": "the time was up"},
            "cifar10",
        )
    }
    assert rows["disco_gain_points_cifar10"]["value"] == pytest.approx(16) and rows[
        "disco_gain_linear_points_cifar10"
    ]["value"] == pytest.approx(16)
    assert (
        rows["teacher_knn"]["value"],
        rows["alone_knn"]["value"],
        rows["disco_knn"]["value"],
    ) == (70, 45, 61)
    assert rows["seed_gain_points_cifar10"]["reason"] == "seed: the time was up, too"
    assert (
        rows["disco_gain_equal_time_points_cifar10"]["reason"]
        == "alone_equal_time: the time was up"
    )
    assert rows["untrained_student_knn"]["value"] == 20 and rows["alone_linear"]["value"] == 55


def test_linear_accuracy_of_features_that_tell_the_class_and_of_none(tmp_path):
    for part, n in (("train", 9), ("val", 4)):
        for label in range(3):
            (tmp_path / part / f"class{label}").mkdir(parents=True)
            for i in range(n):  # a dark image with one bright channel
                Image.fromarray(
                    np.full((32, 32, 3), 10 * i, np.uint8)
                    + np.uint8(120) * np.eye(3, dtype=np.uint8)[label]
                ).save(tmp_path / part / f"class{label}" / f"{i}.png")
    where = dict(
        train=f"{tmp_path}/train", val=f"{tmp_path}/val", eval_resize=32, eval_size=32, threads=1
    )
    cfg = config.validate(dict(run=dict(name="x"), data=where), "here")
    assert scores.linear(lambda x: x.mean((2, 3)), cfg, torch.device("cpu")) == 1
    assert scores.linear(
        lambda x: torch.ones(len(x), 2), cfg, torch.device("cpu")
    ) == pytest.approx(1 / 3)


@pytest.mark.slow
def test_the_whole_bench_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(accuracy.PRESETS, "tiny", TINY)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    call = [
        "--preset",
        "tiny",
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--minutes",
        "0.01",
        "--keep",
    ]
    monkeypatch.setattr(
        accuracy,
        "arm",
        lambda *a, arm=accuracy.arm: arm(
            *a[:-1], time.monotonic() + (HANGS if a[3] != "disco" else -1)
        ),
    )
    stopped = {r["name"]: r for r in accuracy.main(call)}
    assert (
        stopped["teacher_knn"]["value"] is not None
        and stopped["disco_knn"]["reason"] == "disco: the time was up"
    )
    monkeypatch.undo()
    monkeypatch.setitem(accuracy.PRESETS, "tiny", TINY)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    trained, train = [], arms.train
    monkeypatch.setattr(
        arms,
        "train",
        lambda base, settings, end: trained.append(settings[0]) or train(base, settings, end),
    )
    rows = {r["name"]: r for r in accuracy.main(call)}
    # The teacher and the student alone were not trained again.
    assert trained[:2] == ["run.name=disco-0", "run.name=alone_equal_time-0"]
    for name in (
        "disco_gain_points_images",
        "disco_gain_equal_time_points_images",
        "teacher_linear",
        "untrained_teacher_knn",
    ):
        name = name.replace("images", folder.name)
        assert rows[name]["value"] is not None
    kept = json.loads((tmp_path / "results/accuracy-cpu.json").read_text())
    assert (
        kept["plan"]["seconds_per_epoch"].keys() == {"teacher", "alone", "disco"}
        and (tmp_path / "out/accuracy.png").stat().st_size > 10_000
    )
    assert kept["samples"]["disco"][0]["epochs"] == kept["plan"]["epochs"] == 1
    with pytest.raises(config.UserError, match="another seeds"):
        accuracy.main([*call, "--seeds", "1", "2"])
