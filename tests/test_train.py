"""The real command: every way to start it, what it writes, refusing and failing, and equality with
PyTorch's DDP."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT, launch, ranks, run, tiny
from training import SCRIPT, _fails, _knn, _told, _train, losses, metrics, train_a_teacher

from fastdisco import config, data, engine, methods, models
from fastdisco.common import dist
from fastdisco.config import UserError
from fastdisco.run import checkpoint, saving

# ---- starting


@pytest.mark.parametrize("start", ["python", "module", "torchrun", "deepspeed"])
def test_every_start(start, folder, tmp_path):
    args = tiny(folder, tmp_path, "run.max_steps=2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    if start == "deepspeed":
        text = launch(2, SCRIPT, *args)
    elif start == "torchrun":
        text = run(*torchrun, SCRIPT, *args)
    elif start == "module":
        text = run(sys.executable, "-m", "fastdisco.train", *args)
    else:
        text = run(sys.executable, SCRIPT, *args)
    assert "done: 2 steps" in text and text.count("done:") == 1  # rank 0 alone speaks
    n = 2 if start in ("torchrun", "deepspeed") else 1
    assert f"batch 8 = {n} ranks x {8 // n} images" in text
    assert sorted(losses(tmp_path / "tiny")) == [1, 2]


def test_the_installed_package_starts_outside_the_checkout(folder, tmp_path):
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        tmp_path / "site",
        ROOT,
    )
    env = {"PYTHONPATH": str(tmp_path / "site")}
    where = run(
        sys.executable,
        "-c",
        "import fastdisco.kernels as k, fastdisco as f; print(k.__file__, f.__path__)",
        env=env,
        cwd=tmp_path,
    )
    assert str(tmp_path / "site" / "fastdisco" / "kernels") in where and str(ROOT) not in where
    assert "done: 1 steps" in run(
        sys.executable,
        "-m",
        "fastdisco.train",
        *tiny(folder, tmp_path, "run.max_steps=1"),
        env=env,
        cwd=tmp_path,
    )


def test_what_a_run_leaves(folder, tmp_path):
    scaled = ("run.max_steps=6", "eval.every=3", "checkpoint.every=2", "optim.lr_scale=linear")
    text = ranks(1, _told, tiny(folder, tmp_path, *scaled))[0]
    # The scaling rule is printed: 0.05 x 8 / 256.
    assert "linear, lr 0.00156" in text and "for optim.lr 0.05 at batch 256" in text
    out = tmp_path / "tiny"
    assert config.load(out / "config.yaml").optim.lr_scale == "linear"
    assert (
        json.loads((out / "env.json").read_text())["versions"]["torch"].split("+")[0]
        == torch.__version__.split("+")[0]
    )
    # The last two.
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "last",
        "step_00000004",
        "step_00000006",
    ]
    assert list((out / "tb").iterdir())
    rows = metrics(out)
    assert [m["step"] for m in rows if "eval/knn_top1" in m] == [3, 6]
    first = next(m for m in rows if m["step"] == 1)
    assert {
        "train/loss",
        "train/loss_contrast",
        "train/lr",
        "train/epoch",
        "feat/std",
        "perf/total_ips",
        "perf/data_time",
    } <= set(first)
    assert "train/loss_distill" not in first
    assert first["train/loss"] == pytest.approx(first["train/loss_contrast"])
    assert first["train/lr"] == pytest.approx(0.05 * 8 / 256)
    # The same number afterwards.
    assert ranks(1, _knn, out) == [rows[-1]["eval/knn_top1"]]


def test_two_ranks_agree_with_the_evaluation_afterwards(folder, tmp_path):
    # Of seed 0 all features are one, but for rounding.
    ranks(2, _train, tiny(folder, tmp_path, "run.max_steps=4", "run.seed=1"))
    out = tmp_path / "tiny"
    text = run(sys.executable, "-m", "fastdisco.cli", "eval", "knn", out)
    found = json.loads(text.splitlines()[-1])["eval/knn_top1"]
    assert found == metrics(out)[-1]["eval/knn_top1"]


def test_distillation_from_our_own_run(folder, tmp_path):
    train_a_teacher(folder, tmp_path, steps=3)
    ranks(
        2,
        _train,
        tiny(
            folder,
            tmp_path,
            "run.max_steps=3",
            f"teacher.file={tmp_path}/teacher",
            "teacher.arch=test_resnet",
        ),
    )
    rows = metrics(tmp_path / "tiny")
    for m in rows[:3]:
        assert m["train/loss"] == pytest.approx(
            m["train/loss_contrast"] + 4 * m["train/loss_distill"], rel=1e-5
        )
        # ||s-t||^2 = 2 - 2 cos, two views.
        assert m["distill/cosine"] == pytest.approx(1 - m["train/loss_distill"] / 4, abs=1e-5)
    saved = models.read(checkpoint.last(tmp_path / "tiny") / "state.pt")
    assert not [k for part in ("student", "ema", "method") for k in saved[part] if "teacher" in k]
    assert len(saved["meta"]["teacher"]) == 64


def test_bf16_keeps_weights_and_statistics_in_fp32(folder, tmp_path):
    ranks(1, _train, tiny(folder, tmp_path, "run.max_steps=3", "engine.precision=bf16"))
    ranks(1, _train, tiny(folder, tmp_path, "run.max_steps=3", "run.name=fp32"))
    saved = models.read(checkpoint.last(tmp_path / "tiny") / "state.pt")
    assert {v.dtype for part in ("student", "ema") for v in saved[part].values()} == {
        torch.float32,
        torch.int64,
    }
    a, b = losses(tmp_path / "tiny"), losses(tmp_path / "fp32")
    assert a[1] != b[1] and a[1] == pytest.approx(b[1], rel=5e-2)


# ---- failing


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["data.train=/nowhere"], "/nowhere"),
        (["teacher.file=/nowhere.pth"], "/nowhere.pth"),
        (["data.batch=64", "method.queue=64"], "64"),
        (["data.eval_size=64"], "data.eval_size"),
        (["engine.precision=fp16"], "engine.precision: fp16 needs a GPU"),
        (["student.arch=mobilenetv9"], "mobilenetv9"),
        (["optim.name=sgdx"], "optim.name"),
        (
            ["engine.deepspeed={zero_optimisation: {stage: 1}}"],
            "engine.deepspeed.zero_optimisation",
        ),
        (["engine.deepspeed={gradient_clipping: 1}"], "engine.deepspeed.gradient_clipping"),
    ],
    ids=lambda v: v if isinstance(v, str) else v[0].split("=")[0],
)
def test_what_cannot_work_is_one_sentence_before_training(folder, tmp_path, overrides, says):
    if torch.cuda.is_available() and "fp16" in overrides[0]:
        pytest.skip("gpu: fp16 runs here")
    code, error = ranks(1, _fails, tiny(folder, tmp_path, *overrides))[0]
    assert (
        code == 2
        and error.startswith("fastdisco: error: ")
        and says in error
        and error.count("\n") == 1
    )
    assert not (tmp_path / "tiny").exists()


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
    code, error = ranks(
        1, _fails, tiny(folder, tmp_path, "optim.lr=1e30", "log.every=5", "checkpoint.every=2")
    )[0]
    assert code == 2 and "is nan" in error and "train/loss" in error
    step = int(error.split("step ")[1].split(":")[0])
    kept = checkpoint.last(tmp_path / "tiny")
    assert kept is None or models.read(kept / "state.pt")["step"] < step
    assert str(tmp_path / "tiny/checkpoints") in error


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    value = {"n": 1}
    state = {
        "n": checkpoint.Item(lambda: value["n"], lambda n: value.update(n=n)),
        "mine": checkpoint.Item(lambda: value["n"], lambda n: None, own=True),
    }
    checkpoint.save(tmp_path, 1, state, {}, keep=2)
    value["n"] = 2
    write = saving._to_disk
    for broken in ("state.pt", "rank_0.pt"):

        def fails(path, what, broken=broken):
            if path.name == broken:
                path.write_bytes(b"half")
                raise OSError("disk full")
            return write(path, what)

        monkeypatch.setattr(saving, "_to_disk", fails)
        with pytest.raises(UserError, match="disk full"):
            checkpoint.save(tmp_path, 2, state, {}, keep=2)
        assert checkpoint.restore(tmp_path, state, {}) == 1 and value["n"] == 1
        value["n"] = 2
    monkeypatch.setattr(saving, "_to_disk", write)
    checkpoint.save(tmp_path, 2, state, {}, keep=2)
    value["n"] = 0
    assert checkpoint.restore(tmp_path, state, {}) == 2 and value["n"] == 2
    (checkpoint.last(tmp_path) / "state.pt").write_bytes(b"damaged")
    # The one before is whole.
    assert checkpoint.restore(tmp_path, state, {}) == 1 and value["n"] == 1
    (tmp_path / "checkpoints/step_00000001/state.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="step_00000002/state.pt"):
        checkpoint.restore(tmp_path, state, {})


# ---- equality with plain PyTorch


def _plain(args, steps):
    """The same training without DeepSpeed: PyTorch's DDP and SGD."""
    cfg = config.load(args[1], args[2:])
    torch.distributed.init_process_group("gloo")
    assert torch.distributed.get_world_size() == 2
    device = torch.device("cpu")
    torch.manual_seed(cfg.run.seed)
    method = methods.create(
        "moco", cfg=cfg.method, dim=cfg.student.dim, seed=cfg.run.seed, shuffle="gather"
    )
    net = models.of(cfg, train=True).to(memory_format=torch.channels_last)
    ema = models.ema_copy(net)
    ddp = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    sgd = torch.optim.SGD(net.parameters(), lr=cfg.optim.lr, momentum=0.9, weight_decay=1e-4)
    loader = data.TrainLoader(
        data.listing(cfg.data.train),
        config.crops(cfg),
        4,
        cfg.run.seed,
        cfg.run.epochs,
        1,
        1,
        device,
    )
    torch.manual_seed(dist.mix(cfg.run.seed, dist.rank()))
    out = []
    for step in range(steps):
        sgd.param_groups[0]["lr"] = (
            cfg.optim.lr * 0.5 * (1 + math.cos(math.pi * step / (5 * cfg.run.epochs)))
        )
        terms = method.step(
            methods.Nets(ddp, torch.no_grad()(ema), None),
            next(loader).views,
            methods.Progress(step, 0.0),
        )
        sgd.zero_grad()
        terms["contrast"].backward()
        sgd.step()
        models.ema_update(ema, net, 0.9)
        method.after_step()
        out.append(dist.all_mean(terms["contrast"].detach().clone()).item())
    return out


def _engine(args):
    created = engine.create

    def create(*a):
        made = created(*a)
        assert (
            made.zero_optimization_stage() == 0
            and torch.distributed.get_world_size() == 2
            and made.gradient_clipping() == 0
        )
        return made

    engine.create = create
    _train(args)


def test_two_ranks_train_as_ddp_does(folder, tmp_path):
    args = [str(a) for a in tiny(folder, tmp_path, "run.max_steps=10")]
    ranks(2, _engine, args)
    ours, plain = losses(tmp_path / "tiny"), ranks(2, _plain, args, 10)[0]
    assert [ours[s] for s in range(1, 11)] == pytest.approx(plain, rel=1e-5)
    assert plain[9] != pytest.approx(plain[0], rel=1e-3)  # something was learnt or at least changed


def test_clipping_and_accumulation_reach_the_engine(folder, tmp_path):
    for name, more in (
        ("plain", ()),
        ("clipped", ("optim.clip=0.01",)),
        ("halves", ("data.accumulate=2", "bn.groups=1")),
    ):
        ranks(1, _train, tiny(folder, tmp_path, "run.max_steps=4", f"run.name={name}", *more))
    plain, clipped, halves = (losses(tmp_path / n) for n in ("plain", "clipped", "halves"))
    assert plain[1] == clipped[1] and plain[4] != clipped[4]
    assert sorted(halves) == [1, 2, 3, 4]


# ---- what only a GPU can tell


@pytest.mark.gpu
@pytest.mark.parametrize("precision, near", [("fp32", 2e-2), ("bf16", 1e-1), ("fp16", 1e-1)])
def test_a_gpu_trains_as_the_cpu_does(folder, tmp_path, precision, near):
    """The first loss, from the same weights and views: later ones drift."""
    ranks(
        1,
        _train,
        tiny(
            folder,
            tmp_path,
            "run.max_steps=4",
            f"engine.precision={precision}",
            "student.kwargs={}",
        ),
    )
    run(
        sys.executable,
        ROOT / "fastdisco/train.py",
        *tiny(folder, tmp_path, "run.max_steps=1", "run.name=cpu", "student.kwargs={}"),
        env={"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
    )
    assert losses(tmp_path / "tiny")[1] == pytest.approx(losses(tmp_path / "cpu")[1], rel=near)


@pytest.mark.gpu
def test_the_loss_scaler_is_resumed(folder, tmp_path):
    args = tiny(folder, tmp_path, "engine.precision=fp16")
    ranks(1, _train, [*args, "run.max_steps=4"])
    before = models.read(checkpoint.last(tmp_path / "tiny") / "state.pt")["scaler"]
    ranks(1, _train, [*args, "run.max_steps=5"])
    after = models.read(checkpoint.last(tmp_path / "tiny") / "state.pt")["scaler"]
    assert before["scale"] and after["_growth_tracker"] == before["_growth_tracker"] + 1
