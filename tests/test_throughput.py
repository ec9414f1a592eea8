"""bench/throughput.py and the official recipe it compares with: same losses as ours, what is
measured, and what the verdict says."""

import copy
import json
import math
import shutil
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, ranks, run, tiny
from PIL import Image
from training import _train, losses

from fastdisco import config, data, engine, methods, models
from fastdisco.common import dist
from fastdisco.config import Crop
from fastdisco.methods import Nets, Progress
from fastdisco.models import heads

sys.path.insert(0, str(ROOT / "bench"))
import official
import throughput
from harness import synthetic
from step import arms, measure, roofline
from step.ours import Ours
from step.verdict import REMEDY, verdict

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The result of `python bench/throughput.py --quick`, and what it printed."""
    out = tmp_path_factory.mktemp("quick")
    text = run(sys.executable, "bench/throughput.py", "--quick", "--out", out)
    return json.loads((out / "throughput-cpu.json").read_text()), text, out


def nets(queue):
    """Student, teacher and ours, all float64, with the queue [K,d]."""
    torch.manual_seed(1)
    make = lambda arch: models.create(arch, lambda d: heads.mlp(d, 12, 8)).double()
    student, teacher = make("test_efficientnet"), make("test_resnet").eval().requires_grad_(False)
    method = methods.create(
        "moco",
        cfg=config.Moco(queue=len(queue), momentum=0.9, temp=0.2),
        dim=8,
        seed=0,
        shuffle="off",
    )
    method.queue.rows = queue.clone()
    return student, teacher, method


def test_the_official_recipe_has_our_losses():
    """Three steps from the same weights, teacher in eval mode: cross-entropy, and the squared
    errors, which it sums over the images."""
    queue = torch.nn.functional.normalize(
        torch.randn(24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1
    )
    student, teacher, method = nets(queue)
    ema = models.ema_copy(student)
    theirs = official.Official(
        copy.deepcopy(student),
        copy.deepcopy(teacher),
        24,
        8,
        CPU,
        0.2,
        0.9,
        lr=0.01,
        eval_teacher=True,
    )
    theirs.builder.queue = queue.T.clone()
    sgd = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    g = torch.Generator().manual_seed(2)
    for step in range(3):
        views = [torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=g) for _ in range(2)]
        terms = method.step(
            Nets(student, torch.no_grad()(ema), torch.no_grad()(teacher)),
            views,
            Progress(step, 0.0),
        )
        contrast, a, b = theirs(*views)
        assert contrast == pytest.approx(terms["contrast"].item(), rel=1e-9)
        assert a + b == pytest.approx(8 * terms["distill"].item(), rel=1e-9)
        sgd.zero_grad()
        (terms["contrast"] + 8 * terms["distill"]).backward()
        sgd.step()
        models.ema_update(ema, student, 0.9)
        method.after_step()
    assert torch.allclose(
        theirs.builder.queue.T, method.queue.rows, rtol=1e-9
    ) and not torch.allclose(method.queue.rows, queue)


def test_the_official_recipe_is_as_published():
    """Its teacher uses batch statistics, and moves its own running ones; top-5 is of all K+1
    logits."""
    student, teacher, _ = nets(torch.zeros(24, 8))
    theirs = official.Official(student.float(), teacher.float(), 24, 8, CPU)
    mean = {
        k: b.clone()
        for k, b in theirs.builder.teacher_q.named_buffers()
        if k.endswith("running_mean")
    }
    theirs(*torch.randn(2, 8, 3, 32, 32))
    assert all(
        not torch.equal(b, mean[k])
        for k, b in theirs.builder.teacher_q.named_buffers()
        if k in mean
    )
    logits = torch.tensor(
        [
            [3.0, 2, 1, 0, 4, 5, 6],
            [1, 0, 0, 0, 0, 0, 2],
            [0, 9, 9, 9, 9, 9, 9],
            [9, 0, 0, 0, 0, 0, 0],
        ]
    )
    # Ranks 4, 2, 7, 1.
    assert [x.item() for x in official._accuracy(logits, torch.zeros(4, dtype=torch.long))] == [
        25,
        75,
    ]


def test_the_official_recipe_gets_views_as_it_would_load_them():
    """On a GPU our loader gives half precision, channels last."""
    views = [torch.rand(2, 3, 4, 4).half().to(memory_format=torch.channels_last) for _ in range(2)]
    for view, given in zip(views, arms.as_published(views), strict=True):
        assert given.dtype == torch.float32 and given.is_contiguous()
        assert torch.equal(given, view.float())


def test_two_ranks_give_the_official_recipe_one_batch(tmp_path):
    """Queue and losses are those of the whole batch for networks without batch norm."""
    one = ranks(1, _official_steps)[0]
    two = ranks(2, _official_steps)
    assert two[0][0] == two[1][0] and two[0][0] == pytest.approx(one[0], abs=1e-6)
    assert (two[0][1] + two[1][1]) / 2 == pytest.approx(one[1], rel=1e-5)


def _official_steps():
    """(queue after a step, contrast) of 8 images over the ranks."""
    if dist.world() > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 16))
    net = models.Net(flat, torch.nn.Linear(16, 8))
    theirs = official.Official(net, copy.deepcopy(net), 24, 8, CPU)
    views = torch.randn(2, 8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    mine = slice(dist.rank() * 8 // dist.world(), (dist.rank() + 1) * 8 // dist.world())
    contrast, _, _ = theirs(views[0, mine], views[1, mine])
    return theirs.builder.queue.flatten().tolist(), contrast


def test_the_bench_runs_the_training_step(folder, tmp_path):
    """Its step gives the losses that train.py logs."""
    args = [str(a) for a in tiny(folder, tmp_path, "run.max_steps=4", "student.kwargs={}")]
    ranks(1, _train, [*args, "run.name=teacher", "student.arch=test_resnet"])
    args += [f"teacher.file={tmp_path}/teacher", "teacher.arch=test_resnet"]
    ranks(1, _train, [*args, "optim.schedule=constant"])
    assert ranks(1, _bench_losses, args)[0] == pytest.approx(
        [losses(tmp_path / "tiny")[s] for s in range(1, 5)], rel=1e-5
    )


def _bench_losses(args):
    cfg = config.load(args[1], args[2:])
    device = engine.start(cfg.engine)
    ours = Ours(cfg, data.listing(cfg.data.train), 8, device)
    return [ours.step(next(ours.loader).views).item() for _ in range(4)]


# ---- the verdict

PARTS = dict(teacher=0.4, student=0.5, ema=0.05, loss=0.03, optimizer=0.02)


@pytest.mark.parametrize(
    "rates, full, bound, share, part, ceiling",
    [
        (dict(loader=100, compute=400), 95, "loader", 0.95, "loader", ("compute", 400)),
        (
            dict(loader=1000, compute=400, exchange=700),
            300,
            "compute",
            0.75,
            "student",
            ("exchange", 700),
        ),
        (
            dict(loader=1000, compute=400, exchange=900),
            300,
            "compute",
            0.75,
            "student",
            ("compute with the student at no cost", 800),
        ),
        (
            dict(loader=1000, compute=400, exchange=90),
            88,
            "exchange",
            88 / 90,
            "exchange",
            ("compute", 400),
        ),
    ],
)
def test_what_bounds_and_what_next(rates, full, bound, share, part, ceiling):
    v = verdict(rates, PARTS, full)
    assert (v.bound, v.part, v.ceiling[0]) == (bound, part, ceiling[0])
    assert v.share == pytest.approx(share) and v.ceiling[1] == pytest.approx(ceiling[1])
    assert (
        f"The {bound} bounds" in v.text
        and REMEDY[part] in v.text
        and f"{ceiling[1]:.0f} images/s" in v.text
    )
    assert ("wait for each other" in v.text) == (share < 0.9)


def test_a_large_teacher_is_to_be_recorded():
    v = verdict(dict(loader=1000, compute=400), PARTS | dict(teacher=0.9), 390)
    assert (
        v.part == "teacher"
        and "teacher.cache" in v.text
        and v.ceiling == ("compute without it", pytest.approx(400 * 1.5 / 0.6))
    )


# ---- the images


def test_synthetic_images_are_like_photographs_from_the_web(tmp_path):
    synthetic.jpegs(tmp_path, 40)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == 40 and {f.parent.name for f in files} == set(synthetic.PHOTOS)
    assert statistics.median(f.stat().st_size for f in files) == pytest.approx(107_000, rel=0.25)
    sizes = [Image.open(f).size for f in files]
    assert set(sizes) <= set(synthetic.SIZES) and statistics.mode(sizes) == (500, 375)
    assert len({f.read_bytes() for f in files}) == 40


def test_more_images_than_distinct_ones_are_links(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "DISTINCT", 3)
    synthetic.jpegs(tmp_path, 7, scale=0.2)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == 7 and len({f.stat().st_ino for f in files}) == 3
    assert len(data.listing(tmp_path).files) == 7


# ---- the command


def test_quick_measures_every_part_and_row(quick):
    result, text, out = quick
    rows = {r["name"]: r for r in result["summary"]}
    measured = {f"{name}_cpu" for name in throughput.ROWS}
    assert measured <= rows.keys() and all(
        math.isfinite(rows[name]["value"]) and rows[name]["value"] > 0
        for name in measured - {"data_wait_cpu"}
    )
    assert 0 <= rows["data_wait_cpu"]["value"] < 1
    assert (
        all(
            r["value"] is None and "GPU" in r["reason"]
            for name, r in rows.items()
            if name.endswith("_gpu")
        )
        and "step_vs_official_gpu" in rows
    )
    assert (
        rows["step_vs_official_cpu"]["aim"] == 1.5
        and rows["cached_vs_live_step_cpu"]["aim"] == 1.4
        and rows["teacher_mfu_gpu"]["aim"] == 0.25
    )
    assert {
        "loader",
        "teacher",
        "student",
        "ema",
        "loss",
        "optimizer",
        "compute",
        "ready",
        "full",
        "cached",
        "bf16",
        "official",
        "official_ready",
        "matmul",
    } == result["samples"]["8"].keys()
    assert all(len(v) == 2 for v in result["samples"]["8"].values())
    found = result["details"]["8"]
    assert (
        found["cached_cosine"] >= 0.9999
        and found["verdict"] in text.replace("\n", " ")
        and "TF32" in result["official"]
    )
    assert {"total_ips", "compute_ips", "data_time"} <= found.keys()
    assert (out / "throughput-cpu.png").stat().st_size > 10_000


def test_rows_are_those_of_the_samples(quick):
    result = quick[0]
    took, value = result["samples"]["8"], {r["name"]: r["value"] for r in result["summary"]}
    assert value["step_ips_cpu"] == pytest.approx(8 / statistics.median(took["full"]), rel=1e-3)
    assert value["step_vs_official_cpu"] == pytest.approx(
        statistics.median(o / f for f, o in zip(took["full"], took["official"])), rel=1e-3
    )
    slowest = min(8 / statistics.median(took[k]) for k in ("loader", "compute"))
    assert value["step_share_of_slowest_cpu"] == pytest.approx(
        8 / statistics.median(took["full"]) / slowest, rel=1e-3
    )


def test_operations_are_counted():
    """A ResNet-50's forward is known: 4.1 G multiply-adds at 224 px."""
    torch.manual_seed(0)
    net = models.create("resnet50", lambda dim: torch.nn.Identity()).eval()
    loader = SimpleNamespace(crops=(Crop(), Crop()))
    twin = models.create("test_efficientnet", lambda dim: torch.nn.Identity())
    found = roofline.work(SimpleNamespace(loader=loader, twin=twin), net, CPU, 2)
    # Two views, two operations each.
    assert found["flops"]["teacher"] == pytest.approx(2 * 2 * 4.1e9, rel=0.02)
    alone = roofline.work(SimpleNamespace(loader=loader, twin=net), twin, CPU, 2)
    # But for the images' gradient.
    assert alone["flops"]["student"] == pytest.approx(3 * found["flops"]["teacher"], rel=0.05)
    models.split_bn(twin, 4)  # takes 4 images and more
    again = roofline.work(SimpleNamespace(loader=loader, twin=twin), net, CPU, 8)
    assert again["flops"] == pytest.approx(found["flops"]) and again["traffic"] == pytest.approx(
        found["traffic"]
    )


def test_ones_own_images_are_measured(folder, tmp_path):
    """Of any kind: the official recipe gets some as class folders."""
    # A copy, since a list lies beside its images.
    own = shutil.copytree(folder, tmp_path / "own")
    images = sorted((own / "train").rglob("*.jpg"))
    lines = [f"{p.relative_to(own)} {p.parent.name}\n" for p in images]
    (own / "list.txt").write_text("".join(lines))
    listing = data.listing(own / "list.txt")
    few = listing._replace(left_out=listing.kept[5:])
    plain = data.listing(measure.plain_folder(few, tmp_path))
    assert (
        sorted(map(plain.read, range(5))) == sorted(map(listing.read, range(5)))
        and len(plain.files) == 5
    )


@pytest.mark.gpu
def test_quick_on_a_gpu(tmp_path):
    run(sys.executable, "bench/throughput.py", "--quick", "--out", tmp_path)
    rows = {
        r["name"]: r["value"]
        for r in json.loads((tmp_path / "throughput-gpu.json").read_text())["summary"]
    }
    assert {f"{name}_gpu" for name in throughput.ROWS if "bf16" not in name} <= rows.keys() and all(
        v is not None for v in rows.values()
    )
