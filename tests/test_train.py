"""The real command: every way to start it, what it writes, resuming, refusing, stopping, and
equality with PyTorch's DDP."""

import contextlib
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import HANGS, ROOT, launch, ranks, run, tiny

from fastdisco import cli, config, data, engine, methods, models
from fastdisco.commands import train
from fastdisco.common import dist
from fastdisco.config import UserError
from fastdisco.run import checkpoint, log

SCRIPT = ROOT / "fastdisco/train.py"


def metrics(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return {m["step"]: m["train/loss"] for m in metrics(folder) if "train/loss" in m}


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
    ranks(
        1,
        _train,
        tiny(
            folder,
            tmp_path,
            "run.max_steps=3",
            "run.name=teacher",
            "student.arch=test_resnet",
            "student.kwargs={}",
        ),
    )
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


def _train(args):
    code = train.main([str(a) for a in args])
    assert code == 0, f"ended with {code}"


def _told(args):
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        log.console.file = out
        _train(args)
    return out.getvalue()


def _fails(args):
    """(exit code, what the command says of the error)"""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = train.main([str(a) for a in args])
    return code, "".join(x for x in err.getvalue().splitlines(True) if x.startswith("fastdisco"))


def _knn(folder):
    """What `fastdisco eval knn` finds for a run."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["eval", "knn", str(folder)]) == 0
    return json.loads(out.getvalue().splitlines()[-1])["eval/knn_top1"]


# ---- resuming


def _trajectory(args, drop):
    """Trains with a checkpoint's item left out of what is restored; returns the image indices
    seen."""
    seen, step, restore = [], data.TrainLoader.__next__, checkpoint.restore

    def record(self):
        batch = step(self)
        seen.append(batch.index.tolist())
        return batch

    data.TrainLoader.__next__ = record
    checkpoint.restore = lambda run, state, meta: restore(
        run, {k: v for k, v in state.items() if k != drop}, meta
    )
    _train(args)
    return seen


def _distilled(folder, out, where, *overrides):
    return tiny(
        folder, where, f"teacher.file={out}/teacher", "teacher.arch=test_resnet", *overrides
    )


def _differences(folder_a, folder_b, n):
    """Names of what two finished runs do not have bit-equal."""
    found = []
    for file in ["state.pt"] + [f"rank_{r}.pt" for r in range(n)]:
        a, b = (
            config.flatten(models.read(checkpoint.last(f) / file)) for f in (folder_a, folder_b)
        )
        assert a.keys() == b.keys()
        found += [
            f"{file}:{k}"
            for k in a
            if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])
        ]
    a, b = losses(folder_a), losses(folder_b)
    assert sorted(a) == sorted(b) == list(range(1, 15))
    return found + [f"loss:{s}" for s in a if a[s] != b[s]]


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, folder, tmp_path_factory):
    """14 uninterrupted steps on 1 or 2 ranks, distilled from a teacher of our own, in whole/; the
    first 7 alone in half/."""
    out, n = tmp_path_factory.mktemp(f"whole{request.param}"), request.param
    ranks(
        1,
        _train,
        tiny(
            folder,
            out,
            "run.max_steps=2",
            "run.name=teacher",
            "student.arch=test_resnet",
            "student.kwargs={}",
        ),
    )
    seen = ranks(n, _trajectory, _distilled(folder, out, out / "whole", "run.max_steps=14"), None)
    ranks(n, _trajectory, _distilled(folder, out, out / "half", "run.max_steps=7"), None)
    return out, n, seen


def _resumed(whole, folder, name, drop=None):
    """The second 7 steps in new processes, from a copy of half/."""
    out, n, _ = whole
    shutil.copytree(out / "half", out / name)
    return ranks(n, _trajectory, _distilled(folder, out, out / name, "run.max_steps=14"), drop)


def test_resume_is_exact(whole, folder):
    """Stopped in the middle of the second epoch (5 steps each), with the queue (24 keys, 8 a step)
    wrapped."""
    out, n, seen = whole
    rest = _resumed(whole, folder, "parts")
    assert _differences(out / "whole/tiny", out / "parts/tiny", n) == []
    assert [s[7:] for s in seen] == rest
    assert (
        models.read(checkpoint.last(out / "whole/tiny") / "state.pt")["method"]["queue.ptr"]
        == 14 * 8 % 24
    )


# Tiny recipes: queues that fill and wrap, layers that are frozen at first, crops of two sizes.
METHODS = {
    "swav": [
        "method={name: swav, prototypes: 20, freeze_steps: 3, queue: 16, queue_epoch: 0, distill: "
        "1.0}",
        "bn.sync=false",
        "views=[{count: 2, size: 32}, {count: 2, size: 24, scale: [0.1, 0.3]}]",
        "optim.name=lars",
    ],
    "dino": [
        "method={name: dino, prototypes: 30, temp_warmup_epochs: 3}",
        "student.dim=8",
        "student.kwargs.drop_path_rate=0.2",
        "views=[{size: 32}, {size: 32, blur_p: 0.1}, {count: 2, size: 24}]",
        "optim={warmup_epochs: 1, lr: 0.1}",
    ],
    "seed": [
        "method={name: seed, queue: 24, contrast: 1.0}",
        "views=[{count: 2}]",
        "optim={warmup_epochs: 0}",
    ],
}


@pytest.fixture(scope="module")
def teacher_run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    ranks(
        1,
        _train,
        tiny(
            folder,
            out,
            "run.max_steps=1",
            "run.name=teacher",
            "student.arch=test_resnet",
            "student.kwargs={}",
        ),
    )
    return out / "teacher"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_exactly(name, folder, teacher_run, tmp_path):
    """From step 7 of 14, in the second epoch; swav on two ranks."""
    n = 2 if name == "swav" else 1
    args = [
        *METHODS[name],
        "teacher.arch=test_resnet",
        f"teacher.file={teacher_run}",
        "run.max_steps=14",
        "checkpoint.every=7",
    ]
    ranks(n, _train, tiny(folder, tmp_path / "whole", *args))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts/tiny/checkpoints/last").write_text("step_00000007")
    shutil.rmtree(tmp_path / "parts/tiny/checkpoints/step_00000014")
    ranks(n, _train, tiny(folder, tmp_path / "parts", *args))
    assert _differences(tmp_path / "whole/tiny", tmp_path / "parts/tiny", n) == []
    saved = models.read(checkpoint.last(tmp_path / "parts/tiny") / "state.pt")
    assert ("ema" in saved) == (name != "swav")
    # Its head and prototypes by the configuration alone.
    net, _ = models.from_run(tmp_path / "parts/tiny")
    assert (net.prototypes is not None) == (name != "seed")


def test_prototypes_and_their_queue_work_with_zero(folder, teacher_run, tmp_path):
    for stage in (0, 3):
        more = [
            "method.freeze_steps=0",
            "optim.name=sgd",
            "optim.lr=0.05",
            f"engine.stage={stage}",
            f"run.name=stage{stage}",
            "run.max_steps=5",
        ]
        ranks(
            1,
            _train,
            tiny(
                folder,
                tmp_path,
                *METHODS["swav"],
                "teacher.arch=test_resnet",
                f"teacher.file={teacher_run}",
                *more,
            ),
        )
    assert losses(tmp_path / "stage3") == pytest.approx(losses(tmp_path / "stage0"), rel=1e-5)


@pytest.mark.parametrize("whole", [2], indirect=True)
@pytest.mark.parametrize(
    "item",
    ["student", "ema", "method", "optimizer", "data", "student_buffers", "ema_buffers", "rng"],
)
def test_resume_needs_every_item(whole, folder, item):
    out, n, _ = whole
    _resumed(whole, folder, f"without_{item}", drop=item)
    assert _differences(out / "whole/tiny", out / f"without_{item}/tiny", n) != []


def test_the_list_of_items_is_the_one_tested():
    parameters = next(
        m for m in test_resume_needs_every_item.pytestmark if m.args[0] == "item"
    ).args[1]
    net = torch.nn.Linear(1, 1)
    student = types.SimpleNamespace(module=net, torch_autocast_z0_gradscaler=None)
    # Tests/test_engine.py.
    assert set(checkpoint.items(student, net, net, None)) == {*parameters, "scaler"}


def test_another_number_of_ranks_goes_on(folder, tmp_path):
    ranks(2, _train, tiny(folder, tmp_path, "run.max_steps=7"))
    ranks(1, _train, tiny(folder, tmp_path, "run.max_steps=9"))
    assert sorted(losses(tmp_path / "tiny")) == list(range(1, 10))


def test_a_changed_configuration_is_refused_and_named(folder, tmp_path):
    ranks(1, _train, tiny(folder, tmp_path, "run.max_steps=1"))
    text = run(
        sys.executable,
        SCRIPT,
        *tiny(folder, tmp_path, "optim.lr=0.06", "method.temp=0.1", "log.every=3"),
        code=2,
    )
    assert "optim.lr (0.05 there, 0.06 here), " not in text  # sorted by name
    assert (
        "method.temp (0.2 there, 0.1 here), optim.lr (0.05 there, 0.06 here)" in text
        and "log.every" not in text
    )
    assert "run.name" in text and "--overwrite" in text
    assert "Traceback" not in text
    over = tiny(folder, tmp_path, "optim.lr=0.06", "run.max_steps=1")
    ranks(1, _train, [*over, "--overwrite"])
    assert config.load(tmp_path / "tiny/config.yaml").optim.lr == 0.06


def test_other_data_is_refused(folder, tmp_path):
    ranks(1, _train, tiny(folder, tmp_path, "run.max_steps=1"))
    other = tiny(folder, tmp_path, f"data.train={folder}/val", "run.max_steps=2")
    code, error = ranks(1, _fails, other)[0]
    assert code == 2 and "another data than" in error
    # The run there is as it was.
    assert config.load(tmp_path / "tiny/config.yaml").data.train == folder / "train"


def test_a_folder_that_is_no_run_is_neither_written_nor_deleted(folder, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/thesis.txt").write_text("years")
    for flag in ([], ["--overwrite"]):
        code, error = ranks(1, _fails, [*tiny(folder, tmp_path), *flag])[0]
        assert code == 2 and "holds files but no run" in error
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_left_alone(folder, tmp_path):
    args = tiny(folder, tmp_path, "run.max_steps=1")
    ranks(1, _train, args)
    before = (tmp_path / "tiny/metrics.jsonl").read_bytes()
    assert "done: 1 steps" in ranks(1, _told, args)[0]
    assert (tmp_path / "tiny/metrics.jsonl").read_bytes() == before


def test_sigterm_saves_and_the_same_command_goes_on(folder, tmp_path):
    args = tiny(folder, tmp_path, "run.epochs=100000")
    path = tmp_path / "tiny/metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as p:
        try:
            while p.poll() is None and not (path.exists() and path.stat().st_size):
                time.sleep(0.05)
            p.send_signal(signal.SIGTERM)
            text, _ = p.communicate(timeout=HANGS)
        finally:
            p.kill()
    assert p.returncode == 75 and "stopped as asked" in text, text
    step = models.read(checkpoint.last(tmp_path / "tiny") / "state.pt")["step"]
    ranks(1, _train, [*args, f"run.max_steps={step + 2}"])
    assert sorted(losses(tmp_path / "tiny")) == list(range(1, step + 3))


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
    write = checkpoint._write
    for broken in ("state.pt", "rank_0.pt"):

        def fails(path, what, broken=broken):
            if path.name == broken:
                path.write_bytes(b"half")
                raise OSError("disk full")
            write(path, what)

        monkeypatch.setattr(checkpoint, "_write", fails)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(tmp_path, 2, state, {}, keep=2)
        assert checkpoint.restore(tmp_path, state, {}) == 1 and value["n"] == 1
        value["n"] = 2
    monkeypatch.setattr(checkpoint, "_write", write)
    checkpoint.save(tmp_path, 2, state, {}, keep=2)
    value["n"] = 0
    assert checkpoint.restore(tmp_path, state, {}) == 2 and value["n"] == 2
    (checkpoint.last(tmp_path) / "state.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="state.pt"):
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
