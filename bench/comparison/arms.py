"""The arms of bench/accuracy.py: real training commands that go on where they stopped, and what each
finished one scores."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import ROOT
from harness.runs import command, knn_top1, metrics, untrained
from pictures.accuracy import TITLES

from comparison.scores import linear
from fastdisco import models

SHARED = dict(
    method=dict(name="moco", queue=4096, momentum=0.99), checkpoint=dict(every=100, keep=1)
)
# Spelled out, since a method may bring a recipe of its own.
PLAIN = dict(lr_scale="none", warmup_epochs=0, per="step")
# The teacher's network and step size, how many steps tell the speed, and the student's configuration.
PRESETS = {
    "cpu": dict(
        teacher="resnet18",
        teacher_lr=0.06,
        probe=40,
        cfg=SHARED
        | dict(
            data=dict(batch=128, threads=2, eval_resize=32, eval_size=32, eval_batch=256),
            view=dict(size=32, scale=[0.5, 1.0], blur_sigma=[0.1, 1.0]),
            student=dict(arch="mobilenetv3_small_050", hidden=2048),
            bn=dict(groups=4),
            optim=dict(lr=0.03, **PLAIN),
        ),
    ),
    "gpu": dict(
        teacher="resnet50",
        teacher_lr=0.06,
        probe=200,
        cfg=SHARED
        | dict(
            data=dict(batch=256, threads=12, eval_resize=64, eval_size=64, eval_batch=512),
            view=dict(size=64, scale=[0.3, 1.0], blur_sigma=[0.1, 1.0]),
            student=dict(arch="mobilenetv3_large_100", hidden=2048),
            bn=dict(groups=8),
            optim=dict(lr=0.06, **PLAIN),
            engine=dict(precision="bf16"),
            checkpoint=dict(every=1000, keep=1),
        ),
    ),
}
# What differs from the student's configuration; OUT, TEACHER and the queue's length, QUEUE, are
# filled in.
ARMS = {
    "alone": [],
    "disco": ["teacher={file: OUT/teacher, arch: TEACHER}"],
    # And the epochs.
    "alone_equal_time": [],
    "seed": ["teacher={file: OUT/teacher, arch: TEACHER}", "method={name: seed, queue: QUEUE}"],
}


class Stopped(Exception):
    """The call's time is up."""


def arm(out: Path, base: Path, preset: dict, name: str, seed: int, epochs: int, end: float) -> dict:
    """Trains the arm unless it is finished, until `end` on time.monotonic()'s clock.

    Returns kNN and linear accuracy, 0 to 1, also of the network that it began with, minutes of
    training, and epochs.  Raises Stopped where the time is up first."""
    settings = arm_settings(out, preset, name, seed, epochs)
    run = out / settings[0].removeprefix("run.name=")
    if not finished(run):
        print(f"\n{TITLES[name]}, seed {seed}, {epochs} epochs", flush=True)
        train(base, settings, end)
        if not finished(run):
            raise Stopped(f"stopped within {run.name}")
    file = run / "accuracy.json"
    if not file.exists():
        if time.monotonic() > end:
            raise Stopped(f"stopped before {run.name} was evaluated")
        file.write_text(json.dumps(evaluated(out, run, name, seed, epochs)))
    return json.loads(file.read_text())


def evaluated(out: Path, run: Path, name: str, seed: int, epochs: int) -> dict[str, float]:
    """The scores of a finished run, as `arm` returns them."""
    lines = metrics(run)
    minutes, knn = trained_minutes(lines), lines[-1]["eval/knn_top1"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, cfg = models.from_run(run)
    accuracy = linear(net.to(device).features, cfg, device)
    scores = dict(epochs=epochs, minutes=minutes, knn=knn, linear=accuracy)
    if name in ("teacher", "alone"):
        first = untrained(run).to(device).features
        before = dict(
            untrained_knn=knn_top1(first, cfg, device),
            untrained_linear=linear(first, cfg, device),
        )
    else:
        # All students of a seed begin as one network.
        alone = json.loads((out / f"alone-{seed}/accuracy.json").read_text())
        before = {key: alone[key] for key in ("untrained_knn", "untrained_linear")}
    return scores | before


def arm_settings(out: Path, preset: dict, name: str, seed: int, epochs: int) -> list[str]:
    """The overrides of the arm's command, the run's name first."""
    common = [f"run.out={out}", f"run.seed={seed}", f"run.epochs={epochs}"]
    if name == "teacher":
        return [
            "run.name=teacher",
            *common,
            f"student.arch={preset['teacher']}",
            f"optim.lr={preset['teacher_lr']}",
        ]
    more, queue = ARMS[name], preset["cfg"]["method"]["queue"]
    for key, value in dict(OUT=out, TEACHER=preset["teacher"], QUEUE=queue).items():
        more = [x.replace(key, str(value)) for x in more]
    return [f"run.name={name}-{seed}", *common, *more]


def train(base: Path, settings: list[str], end: float) -> None:
    """Runs the command, and asks it to stop at `end` of time.monotonic(): it then saves, and a later
    call goes on."""
    if time.monotonic() > end:
        raise Stopped(f"stopped before {settings[0].removeprefix('run.name=')}")
    process = subprocess.Popen(command(base, *settings), cwd=ROOT)
    try:
        code = process.wait(end - time.monotonic())
    except subprocess.TimeoutExpired:
        process.terminate()
        code = process.wait()
        # 75: it has saved; -15: before the loop began there was nothing to save.
        code = 0 if code in (0, 75, -15) else code
    if code:
        # The command has said why.
        sys.exit(code)


def finished(run: Path) -> bool:
    """Whether the last line is the evaluation, and that of the last checkpoint."""
    last, lines = run / "checkpoints/last", run / "metrics.jsonl"
    if not lines.exists() or not last.exists():
        return False
    line = (metrics(run) or [{}])[-1]
    return "eval/knn_top1" in line and last.read_text().strip() == f"step_{line['step']:08}"


def trained_minutes(lines: list[dict]) -> float:
    """Minutes of training alone: without the start, the evaluation, and what a stopped call did
    after its last checkpoint."""
    total, before = 0.0, 0
    for x in lines:
        total += (x["step"] - before) * x.get("perf/step_time", 0.0)
        before = x["step"]
    return total / 60
