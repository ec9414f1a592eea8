"""The real command on real images: two ranks by the deepspeed launcher, killed in the middle, resumed by the same command."""
import json
import subprocess
import sys
import tarfile
import time

import psutil
import pytest
import torch

from conftest import ROOT, run, shared
from fastdisco import config, data, methods, models
from fastdisco.evals import knn


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cifar_trains_through_a_kill(tmp_path):
    with tarfile.open(shared("cifar10-jpeg.tar.xz")) as tar:
        tar.extractall(tmp_path / "images", filter="data")
    folder = next(p.parent for p in (tmp_path / "images").rglob("train"))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators=2", "--master_port=29633", ROOT / "fastdisco/train.py",
               "--config", ROOT / "tests/cifar.yaml", f"data.train={folder}/train", f"data.val={folder}/test", f"run.out={tmp_path}"]
    out = tmp_path / "cifar"
    first = subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoints/last").exists() or steps(out)[-1] < 150:
        assert first.poll() is None, "the first part ended by itself"
        time.sleep(1)
    for p in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
        p.kill()
    time.sleep(5)
    assert (out / "checkpoints/last").read_text() == "step_00000100"
    text = run(*command, timeout=1500)
    assert "continuing after step 100" in text
    assert steps(out) == [*range(10, 391, 10), 390]  # the evaluation's line stands beside the last
    trained = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["eval/knn_top1"]
    assert trained > untrained(out) + 0.01


def steps(out):
    return [json.loads(x)["step"] for x in (out / "metrics.jsonl").read_text().splitlines()]


def untrained(out):
    cfg = config.load(out / "config.yaml")
    torch.manual_seed(cfg.run.seed)
    method = methods.create("moco", cfg=cfg.method, dim=cfg.student.dim, hidden=cfg.student.hidden, crop=cfg.view, seed=0, shuffle="off")
    net = models.create(cfg.student.arch, method.head).eval()
    train, val = data.listing(cfg.data.train), data.listing(cfg.data.val)
    return knn.score(net.features, train, val, cfg.data, cfg.view, cfg.eval, cfg.run.seed, torch.device("cpu"))["knn_top1"]
