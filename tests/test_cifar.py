"""The real command on real images: two ranks by the deepspeed launcher, killed in the middle,
resumed by the same command; and an epoch of each method, whose losses fall."""

import json
import math
import subprocess
import sys
import tarfile
import time

import psutil
import pytest
import torch
from conftest import ROOT, launch, launcher, run, shared

from fastdisco import config, data, models
from fastdisco.evals import knn

# Seconds; what hangs is ended then.
HOURS = 2 * 3600


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared("cifar10-jpeg.tar.xz")) as tar:
        tar.extractall(root, filter="data")
    return next(p.parent for p in root.rglob("train"))


@pytest.mark.slow
@pytest.mark.timeout(2 * HOURS)
def test_cifar_trains_through_a_kill(cifar, tmp_path):
    command = [
        ROOT / "fastdisco/train.py",
        "--config",
        ROOT / "tests/cifar.yaml",
        f"data.train={cifar}/train",
        f"data.val={cifar}/test",
        f"run.out={tmp_path}",
    ]
    out = tmp_path / "cifar"
    first = subprocess.Popen(
        [str(c) for c in [*launcher(2), *command]],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (out / "checkpoints/last").exists() or steps(out)[-1] < 150:
        assert first.poll() is None, "the first part ended by itself"
        time.sleep(0.05)
    killed = [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]
    for p in killed:
        p.kill()
    while any(map(alive, killed)):
        time.sleep(0.05)
    assert (out / "checkpoints/last").read_text() == "step_00000100"
    text = launch(2, *command, timeout=HOURS)
    assert "continuing after step 100" in text
    assert steps(out) == [*range(10, 391, 10), 390]  # the evaluation's line stands beside the last
    trained = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["eval/knn_top1"]
    assert trained > untrained(out) + 0.01


# Settings, and below what the contrastive term must end: less than where all outputs are alike,
# which is also where a collapse ends.
STUDENT = [
    "student.arch=mobilenetv3_small_050",
    "student.hidden=512",
    "bn.groups=1",
    "log.every=10",
]
CROPS = "views=[{count: 2}, {count: 4, size: 24, scale: [0.2, 0.5]}]"
METHODS = {
    "moco": (
        ["bn.groups=4", "method={name: moco, queue: 1024, momentum: 0.99}"],
        "contrast",
        math.log(1025) - 0.05,
    ),
    "disco": (
        [
            "bn.groups=4",
            "method={name: moco, queue: 1024, momentum: 0.99, rkd: {distance: 1, angle: 1}}",
            "teacher.file=TEACHER",
        ],
        "contrast",
        math.log(1025) - 0.05,
    ),
    "seed": (
        ["method={name: seed, queue: 1024}", "optim={warmup_epochs: 0}", "teacher.file=TEACHER"],
        "seed",
        math.log(1025) - 0.05,
    ),
    "dino": (
        [
            CROPS,
            "method={name: dino, prototypes: 1024, momentum: 0.99}",
            "bn.sync=false",
            "student.head_bn=true",
            "optim={lr: 1e-3, warmup_epochs: 0}",
        ],
        "dino",
        math.log(1024) - 0.05,
    ),
    # 16 numbers cannot have the same cosine to all of 60 prototypes: outputs alike would cost more
    # than this, and so does an epoch's network.
    "swav": (
        [
            CROPS,
            "method={name: swav, prototypes: 60, freeze_steps: 390, queue: 0}",
            "bn.sync=false",
            "student.dim=16",
            "optim={name: adamw, lr: 1e-3, lr_min: 0}",
        ],
        "swav",
        math.log(60) + 0.3,
    ),
}


@pytest.fixture(scope="module")
def trained(cifar, tmp_path_factory):
    """Runs the command on one rank and gives what it logged; a teacher of half an epoch at
    TEACHER."""
    root = tmp_path_factory.mktemp("runs")

    def go(name, *settings):
        run(
            sys.executable,
            "fastdisco/train.py",
            "--config",
            ROOT / "tests/cifar.yaml",
            f"data.train={cifar}/train",
            f"data.val={cifar}/test",
            f"run.out={root}",
            f"run.name={name}",
            *[s.replace("TEACHER", str(root / "teacher")) for s in settings],
            timeout=HOURS,
        )
        return [json.loads(x) for x in (root / name / "metrics.jsonl").read_text().splitlines()]

    go("teacher", "run.max_steps=195")
    return go


@pytest.mark.slow
@pytest.mark.timeout(2 * HOURS)
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_each_method_falls(method, trained):
    settings, term, below = METHODS[method]
    lines = trained(method, *STUDENT, *settings)[:-1]
    at = lambda term, part: sum(x[f"train/loss_{term}"] for x in part) / len(part)
    first, last = lines[:5], lines[-5:]
    # A queue of random rows is easy: MoCo's and SEED's rise at first.
    highest = max(at(term, lines[i : i + 5]) for i in range(len(lines) - 5))
    assert at(term, last) < min(below, highest - 0.05)
    if method == "disco":
        assert all(
            at(term, last) < 0.7 * at(term, first)
            for term in ("distill", "rkd_distance", "rkd_angle")
        )
    else:  # a teacher of half an epoch is no measure for how far images are to be apart
        assert lines[-1]["feat/std"] > 0.4


def alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def steps(out):
    return [json.loads(x)["step"] for x in (out / "metrics.jsonl").read_text().splitlines()]


def untrained(out):
    cfg = config.load(out / "config.yaml")
    torch.manual_seed(cfg.run.seed)
    net = models.of(cfg).eval()
    train, val = data.listing(cfg.data.train), data.listing(cfg.data.val)
    return knn.score(
        net.features, train, val, cfg.data, cfg.view, cfg.eval, cfg.run.seed, torch.device("cpu")
    )["knn_top1"]
