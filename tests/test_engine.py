"""ZeRO stages 0 to 3 against plain PyTorch: losses, mean student, clipping, accumulation, resuming
at any stage and number of ranks."""

import contextlib
import json
import shutil
import types

import pytest
import torch
from conftest import ranks, tiny
from torch import nn
from training import _differences, _knn, _train, losses

from fastdisco import config, engine, models
from fastdisco.common import dist
from fastdisco.config import Engine, Optim, UserError
from fastdisco.engine import optim
from fastdisco.models import heads
from fastdisco.run import checkpoint
from fastdisco.run.folder import claim, describe

STEPS, HALF, BATCH = 20, 10, 8
# Optimizer, how it is made in plain torch, clip, accumulate, precision, how near a loss must be.
CASES = {
    "adamw": (
        Optim(name="adamw", decay_norm_and_bias=False, weight_decay=0.05),
        0.0,
        1,
        "fp32",
        1e-6,
    ),
    "clipped": (Optim(name="sgd", weight_decay=1e-2), 0.05, 2, "fp32", 1e-5),
    "unclipped": (Optim(name="sgd", weight_decay=1e-2), 0.0, 2, "fp32", 1e-5),
    "bf16": (Optim(name="sgd"), 0.0, 1, "bf16", 1e-5),
}
STAGES = (0, 1, 2, 3)


def _net():
    """No size divides by 2, so that every piece of ZeRO is cut and padded; nothing in it depends on
    the number of ranks."""
    torch.manual_seed(0)
    return models.Net(
        nn.Sequential(nn.Flatten(), nn.Linear(15, 7), nn.Tanh(), nn.LayerNorm(7)),
        heads.mlp(7, 5, 3),
    )


def _views(step, micro):
    """This rank's share of two views of 8 images."""
    g = torch.Generator().manual_seed(100 * step + micro)
    n = BATCH // dist.world()
    return [torch.randn(BATCH, 3, 1, 5, generator=g)[dist.rank() * n :][:n] for _ in range(2)]


def _loss(z):
    return (z[0] - z[1] + 0.5).square().mean() + z.square().mean()


def _mean(losses):
    return dist.all_mean(torch.stack([x.detach() for x in losses]).mean()).item()


def _ddp(case):
    """[20 losses], [mean student's weights]: DistributedDataParallel with torch's optimizers."""
    cfg, clip, accumulate, precision, _ = CASES[case]
    torch.distributed.init_process_group("gloo")
    net, ema = _net(), _net()
    ddp = nn.parallel.DistributedDataParallel(net)
    decayed, spared = (
        [p for p in net.parameters() if p.dim() > 1],
        [p for p in net.parameters() if p.dim() < 2],
    )
    if cfg.name == "adamw":
        opt = torch.optim.AdamW(
            [{"params": spared, "weight_decay": 0.0}, {"params": decayed}],
            lr=0.03,
            weight_decay=cfg.weight_decay,
        )
    else:
        opt = torch.optim.SGD(
            net.parameters(), lr=0.03, momentum=0.9, weight_decay=cfg.weight_decay
        )
    out = []
    for step in range(STEPS):
        losses = []
        for micro in range(accumulate):
            last = micro == accumulate - 1
            with (
                contextlib.nullcontext() if last else ddp.no_sync(),
                torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
            ):
                losses.append(_loss(ddp(_views(step, micro)).z))
            with contextlib.nullcontext() if last else ddp.no_sync():
                (losses[-1] / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            for e, p in zip(ema.parameters(), net.parameters()):
                e.copy_(0.9 * e + 0.1 * p)
        out.append(_mean(losses))
    return out, [p.tolist() for p in ema.parameters()]


def _zero(case, stage, folder, resume=False, **cfg_engine):
    """The same by our engine; leaves a checkpoint after 10 steps in the folder, or goes on from the
    one there."""
    cfg, clip, accumulate, precision, _ = CASES[case]
    engine.start(Engine(precision=precision))
    net = _net()
    ema = models.ema_copy(net)
    opt = optim.create(net, cfg, 0.03, stage)
    micro = BATCH // dist.world()
    student = engine.create(
        net,
        opt,
        Engine(stage=stage, precision=precision, bucket_mb=1e-4, **cfg_engine),
        micro,
        accumulate,
        clip,
    )
    state = checkpoint.items(student, ema, nn.Module(), types.SimpleNamespace(state=0))
    start = checkpoint.restore(folder, state, {}) if resume else 0
    assert student.zero_optimization_stage() == stage and start == (HALF if resume else 0)
    out = []
    for step in range(start, STEPS):
        losses = []
        for m in range(accumulate):
            losses.append(_loss(student(_views(step, m)).z))
            student.backward(losses[-1])
            student.step()
        with engine.gathered(student):
            models.ema_update(ema, net, 0.9)
        out.append(_mean(losses))
        if step + 1 == HALF and not resume:
            checkpoint.save(folder, HALF, state, {}, keep=1)
    return out, [p.tolist() for p in ema.parameters()]


@pytest.fixture(scope="module")
def plain():
    return {case: ranks(2, _ddp, case)[0] for case in CASES}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """(case, stage) -> its run, made once, and the folder of its checkpoint."""
    made = {}

    def get(case, stage):
        if (case, stage) not in made:
            folder = tmp_path_factory.mktemp(f"{case}{stage}")
            made[case, stage] = *ranks(2, _zero, case, stage, folder)[0], folder
        return made[case, stage]

    return get


def _overlapping(case, stage, folder):
    """DeepSpeed's own overlap, as a GPU gets it."""
    parts = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 30}
    return _zero(case, stage, folder, deepspeed={"zero_optimization": parts})


def _at_the_end(case, folder):
    return _zero(case, 0, folder, overlap=False)


def _near(found, wanted, rel):
    losses, ema = found
    assert losses == pytest.approx(wanted[0][-len(losses) :], rel=rel)
    for a, b in zip(ema, wanted[1], strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=10 * rel, atol=rel)


# ---- what a step is


@pytest.mark.parametrize(
    "case, stage",
    [(c, s) for c in ("adamw", "clipped") for s in STAGES] + [("bf16", 2), ("bf16", 3)],
)
def test_every_stage_gives_the_losses_and_the_mean_student_of_ddp(plain, ours, case, stage):
    _near(ours(case, stage)[:2], plain[case], CASES[case][-1])


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeeds_overlap_changes_nothing(plain, tmp_path, stage):
    _near(ranks(2, _overlapping, "clipped", stage, tmp_path)[0], plain["clipped"], 1e-5)


@pytest.mark.parametrize("case", ["clipped", "bf16"])
def test_our_overlap_gives_what_deepspeeds_exchange_at_the_end_gives(plain, ours, tmp_path, case):
    """Clipping sees the mean gradients, accumulated ones too; on two ranks to the last bit."""
    ends = ranks(2, _at_the_end, case, tmp_path)[0]
    assert ours(case, 0)[:2] == ends
    _near(ends, plain[case], 1e-5)


def test_the_cases_do_what_they_say(plain):
    assert plain["adamw"][0][-1] < 0.8 * plain["adamw"][0][0]  # something is learnt
    assert plain["clipped"][0][0] == plain["unclipped"][0][0]
    assert plain["clipped"][0][-1] != pytest.approx(plain["unclipped"][0][-1], rel=1e-2)
    assert plain["bf16"][0] != plain["unclipped"][0]


# ---- resuming


@pytest.mark.parametrize(
    "case, before, after",
    [
        ("adamw", 1, 1),
        ("adamw", 2, 2),
        ("adamw", 3, 3),
        ("adamw", 0, 3),
        ("adamw", 3, 1),
        ("adamw", 1, 2),
        ("adamw", 2, 0),
        ("clipped", 2, 2),
    ],
)
def test_a_checkpoint_of_any_stage_continues_exactly_at_any(ours, case, before, after):
    """Bit for bit: nothing but the place of weights and states differs."""
    losses, ema, folder = ours(case, before)
    assert ranks(2, _zero, case, after, folder, True)[0] == (losses[HALF:], ema)


@pytest.mark.parametrize("stage", [0, 3])
def test_another_number_of_ranks_continues_as_well(ours, stage):
    losses, ema, folder = ours("adamw", 2)
    _near(ranks(1, _zero, "adamw", stage, folder, True)[0], (losses, ema), 1e-5)


def test_a_checkpoint_is_the_same_at_every_stage(ours):
    a, *rest = (
        config.flatten(models.read(checkpoint.last(ours("adamw", s)[2]) / "state.pt"))
        for s in STAGES
    )
    assert {
        "student.head.0.weight",
        "optimizer.parameters.head.0.weight.exp_avg",
        "optimizer.parameters.head.0.bias.step",
    } <= set(a)
    for b in rest:
        assert a.keys() == b.keys()
        assert [
            k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])
        ] == []


@pytest.mark.parametrize("name", ["lamb", "adan", "adamw"])
def test_an_optimizer_that_counts_in_its_groups_goes_on_counting(name):
    def made():
        net = _net()
        opt = optim.create(net, Optim(name=name), 0.03)
        return types.SimpleNamespace(
            module=net, basic_optimizer=opt, zero_optimization=lambda: False
        )

    def train(student, steps):
        for step in steps:
            student.module.zero_grad()
            _loss(student.module(_views(step, 0)).z).backward()
            student.basic_optimizer.step()

    whole, half, rest = made(), made(), made()
    train(whole, range(6))
    train(half, range(3))
    rest.module.load_state_dict(half.module.state_dict())
    engine.load_optimizer_state(rest, engine.optimizer_state(half))
    train(rest, range(3, 6))
    for a, b in zip(whole.module.parameters(), rest.module.parameters()):
        assert torch.equal(a, b)


def test_the_loss_scaler_is_among_the_items(tmp_path):
    """On the CPU, by the scaler alone; tests/test_train.py has the real run, on a GPU."""

    def state(scaler):
        opt = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1)
        student = types.SimpleNamespace(
            module=nn.Linear(1, 1),
            basic_optimizer=opt,
            zero_optimization=lambda: False,
            zero_optimization_stage=lambda: 0,
            torch_autocast_z0_gradscaler=scaler,
        )
        return checkpoint.items(
            student, nn.Linear(1, 1), nn.Module(), types.SimpleNamespace(state=0)
        )

    def overflow(scaler):
        p = torch.zeros(1, requires_grad=True)
        opt = torch.optim.SGD([p], lr=1)
        scaler.scale((p * float("inf")).sum()).backward()
        scaler.step(opt)
        scaler.update()

    first, second = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    overflow(first)
    checkpoint.save(tmp_path, 1, state(first), {}, keep=1)
    assert checkpoint.restore(tmp_path, state(second), {}) == 1
    second.scale(torch.zeros(1))  # the scaler makes its tensors at first use
    assert (
        second.get_scale() == first.get_scale() == 2.0**15
        and second.state_dict() == first.state_dict()
    )


# ---- refusing (optimizers and precisions: tests/test_optim.py)


def test_what_deepspeed_breaks_is_refused_before_it_is_asked():
    net = _net()
    with pytest.raises(UserError, match="Adagrad.*engine.stage=0"):
        engine.create(
            net, optim.create(net, Optim(name="adagrad"), 0.1, 1), Engine(stage=1), 4, 1, 0.0
        )
    net.gain = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match="student.arch.*gain"):
        engine.create(net, optim.create(net, Optim(), 0.1), Engine(), 4, 1, 0.0)


# ---- what only a GPU can tell


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision, near", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_every_stage_starts_as_stage_0_does_on_a_gpu(folder, tmp_path, stage, precision, near):
    found = []
    for s in (0, stage):
        ranks(
            1,
            _train,
            tiny(
                folder,
                tmp_path,
                "run.max_steps=2",
                f"run.name=s{s}",
                f"engine.stage={s}",
                f"engine.precision={precision}",
                "engine.tf32=false",
            ),
        )
        found.append(losses(tmp_path / f"s{s}")[1])
    assert found[1] == pytest.approx(found[0], rel=near)


# ---- the whole command


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_real_run_resumes_exactly_and_evaluates_at_every_stage(folder, tmp_path, stage):
    """Two ranks, MoCo with dropout, split batch norm and clipping; stopped in the middle of the
    second epoch."""
    args = tiny(
        folder,
        tmp_path,
        f"engine.stage={stage}",
        "checkpoint.every=7",
        "run.max_steps=14",
        "optim.clip=0.5",
    )
    ranks(2, _train, args)
    done, again = tmp_path / "tiny", tmp_path / "again/tiny"
    shutil.copytree(done, again)
    shutil.rmtree(again / "checkpoints/step_00000014")
    (again / "checkpoints/last").write_text("step_00000007")
    ranks(2, _train, [*args, f"run.out={tmp_path / 'again'}"])
    assert _differences(done, again, 2) == []
    knn = [json.loads(x) for x in (done / "metrics.jsonl").read_text().splitlines()][-1][
        "eval/knn_top1"
    ]
    assert ranks(1, _knn, done) == [knn]  # fastdisco eval knn, from the checkpoint


def test_the_stage_may_change_on_resume(tmp_path):
    of = lambda stage, lr: config.validate(
        {
            "run": {"name": "a", "out": tmp_path},
            "data": {"train": "x"},
            "optim": {"lr": lr},
            "engine": {"stage": stage},
        },
        "test",
    )
    describe(of(3, 0.1), tmp_path / "a")
    assert claim(of(0, 0.1)) == tmp_path / "a"
    with pytest.raises(UserError, match="optim.lr"):
        claim(of(0, 0.2))
