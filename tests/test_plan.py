"""`train.py --dry-run`: what it finds, what it refuses, and its estimate of memory by hand."""

import re

import pytest
import torch
from conftest import ROOT, tiny
from layouts import save, small_swav
from torch import nn

from fastdisco import config, models
from fastdisco.commands import train
from fastdisco.run import plan


def dry(capsys, *arguments, code=0):
    assert train.main([str(a) for a in (*arguments, "--dry-run")]) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


def test_with_data_and_teacher_nothing_is_missing_and_nothing_is_written(folder, tmp_path, capsys):
    file = save(tmp_path, small_swav()[0])
    before = sorted(tmp_path.rglob("*"))
    out = dry(
        capsys,
        *tiny(folder, tmp_path, f"teacher.file={file}", "student.dim=16", "run.max_steps=18"),
    )
    assert re.search(r"run +\S+/tiny by moco: new\n", out) and re.search(
        r"data.train +\S+: 43 images of 3 classes, 0 left out", out
    )
    assert "data.val    " in out and "12 images of 3 classes" in out
    assert re.search(
        r"teacher +resnet18: 11\.19 M weights, linear, batch norm, ReLU, linear: 512 -> 24 -> 16; "
        r"a SwAV",
        out,
    )
    assert "batch       8 = 1 ranks x 8 images x 1 accumulated; crops of 2 x 32 px; lr 0.05" in out
    assert "4 epochs x 5 steps = 18 steps" in out and out.endswith("missing     nothing\n")
    assert sorted(tmp_path.rglob("*")) == before
    file.unlink()


@pytest.mark.parametrize(
    "override, says",
    [
        ("data.batch=50", "data.batch: 50 images, but"),
        ("optim.name=none", "timm.optim cannot make 'none'"),
        ("student.arch=resnet_18", "did you mean resnet18"),
        ("bn.groups=3", "divisor of 8"),
        ("engine.stage=1 optim.name=lars", "ZeRO stage 1"),
        ("data.quarantine=/none.txt", "/none.txt: cannot be read"),
    ],
)
def test_what_the_run_would_refuse_is_refused(folder, tmp_path, capsys, override, says):
    assert says in dry(
        capsys, *tiny(folder, tmp_path, *override.split(), "method.queue=64"), code=2
    )


def test_a_teacher_of_another_width_and_the_folder_of_another_run_are_refused(
    folder, tmp_path, capsys
):
    file = save(tmp_path, small_swav()[0])
    assert "embeds into 16 numbers" in dry(
        capsys, *tiny(folder, tmp_path, f"teacher.file={file}"), code=2
    )
    file.unlink()
    arguments = tiny(folder, tmp_path, "run.max_steps=1")
    cfg = config.load(arguments[1], arguments[2:])
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.yaml").write_text(config.dump(cfg))
    assert "tiny by moco: continues what is there" in dry(capsys, *arguments)
    assert "optim.lr (0.05 there, 0.1 here)" in dry(capsys, *arguments, "optim.lr=0.1", code=2)


def test_ranks_share_the_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    out = dry(capsys, "--config", ROOT / "configs/mobv3.yaml", f"run.out={tmp_path}")
    assert (
        "batch       256 = 8 ranks x 32 images x 1 accumulated" in out
        and "missing     teacher.file /data/teachers/moco_v2_200ep" in out
    )


@pytest.mark.parametrize(
    "stage, gib",
    [
        (0, 1 + 1 + 2 + 1),
        (1, 1 + 1 + 2 / 4 + 1),
        (2, 1 + 1 / 4 + 2 / 4 + 1),
        (3, 1 / 4 + 1 / 4 + 2 / 4 + 1),
    ],
)
def test_memory_by_hand(stage, gib):
    """Adam has two states a weight, ZeRO parts them, then gradients, then weights; the mean student
    stays whole."""
    n, batch = 2**14, 3
    with torch.device("meta"):
        net = models.Net(nn.Sequential(nn.Flatten(), nn.Linear(192, n), nn.ReLU()), nn.Linear(n, n))
    cfg = config.validate(
        {
            "run": {"name": "x"},
            "data": {"train": "/t"},
            "optim": {"name": "adamw"},
            "engine": {"stage": stage},
        },
        "here",
    )
    text = plan.memory("", cfg, net, 0.1, 2**20, [8, 8], batch, 4)
    own = (192 * n + n + n * n + n) * 4 / 2**30
    # The input, and the activation that ReLU and the head share; of each crop.
    saved = 2 * batch * (192 + n) * 4
    weights, forward = re.search(r"([\d.]+) GiB of weights.* at most ([\d.]+) GiB", text).groups()
    assert float(weights) == pytest.approx(own * gib + 2**22 / 2**30, abs=0.006) and own > 1
    assert float(forward) == pytest.approx(saved / 2**30, abs=0.006)
    big = plan.memory("", cfg, net, 0.1, 0, [8, 8], 1000 * batch, 4)
    assert float(re.search(r"at most ([\d.]+) GiB", big)[1]) == pytest.approx(
        1000 * saved / 2**30, abs=0.006
    )
    assert (
        f"student {own:.2f}, its optimizer {2 * own:.2f}, mean student {own:.2f}, teacher 0.00"
        in text
    )


@pytest.mark.parametrize(
    "method, has",
    [
        ({"name": "moco"}, True),
        ({"name": "swav"}, False),
        ({"name": "dino"}, True),
        ({"name": "seed"}, False),
        ({"name": "seed", "contrast": 1}, True),
    ],
)
def test_memory_counts_a_mean_student_where_the_method_has_one(method, has):
    with torch.device("meta"):
        net = models.Net(
            nn.Sequential(nn.Flatten(), nn.Linear(192, 2**14)), nn.Linear(2**14, 2**14)
        )
    views = {"views": [{"count": 2}]} if "contrast" in method else {}
    raw = {
        "run": {"name": "x"},
        "data": {"train": "/t"},
        "teacher": {"file": "/t"},
        "method": method,
        "optim": {"name": "sgd"},
    } | views
    text = plan.memory("", config.validate(raw, "here"), net, 0.1, 0, [8, 8], 2, 1)
    assert f"mean student {'1.01' if has else '0.00'}" in text
