"""Resuming: exactly, of every item and for every method; what may change and what is refused;
stopping and going on."""

import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import HANGS, ROOT, ranks, run, tiny
from training import SCRIPT, _differences, _fails, _told, _train, losses, train_a_teacher

from fastdisco import config, data, models
from fastdisco.run import checkpoint

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


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, folder, tmp_path_factory):
    """14 uninterrupted steps on 1 or 2 ranks, distilled from a teacher of our own, in whole/; the
    first 7 alone in half/."""
    out, n = tmp_path_factory.mktemp(f"whole{request.param}"), request.param
    train_a_teacher(folder, out, steps=2)
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
        "bn.sync=false",
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
    train_a_teacher(folder, out, steps=1)
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
    swapped = f"data.train={folder}/val", f"data.val={folder}/train"
    other = tiny(folder, tmp_path, *swapped, "run.max_steps=2")
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
