"""What backward and step do: losses and weights after several optimizer steps of the real engine,
beside an independent loop in plain torch.

The same bodies run on the CPU, where they are known to be right, and on a GPU."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, ranks, run, tiny
from torch import nn

from fastdisco import config, engine, models
from fastdisco.engine import optim
from fastdisco.methods import Progress
from fastdisco.models import Out
from fastdisco.run import students

CPU = torch.device("cpu")
MICRO, ACCUMULATE, STEPS, SIDE, DIM = 8, 2, 4, 32, 8
# Larger than the recipe's, so that a forgotten term shows within these steps.
EMA, DECAY, DISTILL, TEMP, CLIP = 0.9, 1e-2, 4.0, 0.2, 2.0
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of AdamW.  With the usual one its first steps follow the sign of every gradient, however small, and
# half precision decides that by rounding: two convolutions of a CPU end half a way apart.
EPS = {"fp32": 1e-8, "bf16": 1.0, "fp16": 1.0}


def configuration(optimizer, precision, clip):
    moco = dict(name="moco", queue=48, queue_dtype="fp32", momentum=EMA, distill=DISTILL, temp=TEMP)
    told = dict(name=optimizer, lr=0.1 if optimizer == "sgd" else 0.01, weight_decay=DECAY)
    blocks = dict(
        run={"name": "x"},
        data={"train": "x", "batch": MICRO * ACCUMULATE, "accumulate": ACCUMULATE, "eval_size": 32},
        student=dict(arch="test_resnet", hidden=16, dim=DIM),
        method=moco,
        teacher={"file": "x"},
        optim=told | dict(clip=clip, warmup_epochs=0),
        engine=dict(precision=precision, tf32=False),
        bn={"groups": 1},
    )
    return config.validate(blocks, "test")


def inputs():
    """(two views [B,3,S,S], the teacher's embeddings [2,B,d]) of each micro batch of each step."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=g)
    steps = []
    for _ in range(STEPS):
        image = [draw(MICRO, 3, SIDE, SIDE) for _ in range(ACCUMULATE)]
        views = [[x + 0.3 * draw(*x.shape) for _ in range(2)] for x in image]
        steps.append([(pair, draw(2, MICRO, DIM)) for pair in views])
    return steps


def student(cfg):
    torch.manual_seed(cfg.run.seed)
    return models.of(cfg, train=True)


# ---- ours


def ours(kind, optimizer, precision, clip, fused):
    """As train.py steps, in a process of its own: DeepSpeed takes one configuration a process."""
    cfg = configuration(optimizer, precision, clip)
    if fused:
        # The CPU has the fused form, too; the project asks for it on a GPU alone.
        optim._fused = lambda *_: {"fused": True}
    device = engine.start(cfg.engine)
    assert device.type == kind
    state = students.create("", cfg, MICRO, device)
    for group in state.optimizer.param_groups if optimizer == "adamw" else ():
        group["eps"] = EPS[precision]
    queue = state.method.queue.rows.float().cpu().numpy().copy()
    losses = []
    for step, micro_batches in enumerate(inputs()):
        total = 0.0
        for i, (views, target) in enumerate(micro_batches):
            views = [v.to(device, memory_format=torch.channels_last) for v in views]
            target = target.to(device)
            teacher = lambda seen, target=target: Out(target[: len(seen)])
            progress = Progress(step * ACCUMULATE + i, 0.0, 0.0, step)
            loss = state.method.loss(state.method.step(state.nets(teacher), views, progress))
            state.engine.backward(loss)
            state.engine.step()
            total += loss.item() / ACCUMULATE
        with engine.gathered(state.engine):
            models.ema_update(state.ema, state.net, state.method.momentum(progress))
        state.method.after_step()
        losses.append(total)
    held = [*state.net.parameters(), *state.ema.parameters()]
    kept = [x for s in state.optimizer.state.values() for x in s.values() if x.dim() == 4]
    scaler = engine.scaler(state.engine)
    found = dict(
        losses=losses,
        weights=flat(state.net.parameters()),
        ema=flat(state.ema.parameters()),
        statistics=flat(b for b in state.net.buffers() if b.is_floating_point()),
        fused=bool(state.optimizer.defaults.get("fused")),
        channels_last=all(
            x.is_contiguous(memory_format=torch.channels_last)
            for x in [*held, *kept]
            if x.dim() == 4
        ),
        moments=len(kept),
        scale=scaler.get_scale() if scaler else None,
        queue=queue,
    )
    engine.stop()
    return found


def flat(tensors):
    return torch.cat([x.detach().float().cpu().flatten() for x in tensors]).numpy()


# ---- the same in plain torch


def plain(device, optimizer, precision, clip, queue, wrong=""):
    """The papers' formulas with torch's own optimizer, autocast and scaler, NCHW, nothing fused.

    queue: the negatives to begin with.  wrong: one thing that is done wrongly."""
    cfg = configuration(optimizer, precision, clip)
    net = student(cfg).to(device)
    mean = copy.deepcopy(net)
    weights, means = list(net.parameters()), list(mean.parameters())
    lr = cfg.optim.lr
    if optimizer == "sgd":
        momentum = 0.5 if wrong == "momentum" else 0.9
        moves = torch.optim.SGD(weights, lr, momentum, weight_decay=DECAY, foreach=False)
    else:
        eps = EPS[precision]
        moves = torch.optim.AdamW(weights, lr, eps=eps, weight_decay=DECAY, foreach=False)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    half = torch.autocast(device.type, HALF.get(precision), enabled=precision != "fp32")
    rows, at, losses = torch.tensor(queue, device=device), 0, []
    for micro_batches in inputs():
        moves.zero_grad()
        total, keys = 0.0, []
        for (a, b), target in micro_batches:
            with half:
                za, zb = net([a.to(device)]).z[0], net([b.to(device)]).z[0]
                with torch.no_grad():
                    key = mean([b.to(device)]).z[0]
            key = F.normalize(key.float(), dim=1)
            za, zb = za.float(), zb.float()
            query, other = F.normalize(za, dim=1), F.normalize(zb, dim=1)
            logits = torch.cat([(query * key).sum(1, keepdim=True), query @ rows.T], 1) / TEMP
            contrast = -F.log_softmax(logits, 1)[:, 0].mean()
            t = F.normalize(target.to(device), dim=2)
            apart = (t[0] - query).square().sum(1) + (t[1] - other).square().sum(1)
            loss = contrast + DISTILL * apart.mean()
            share = loss if wrong == "accumulate" else loss / ACCUMULATE
            scaler.scale(share).backward()
            total += loss.item() / ACCUMULATE
            keys.append(key)
        if clip:
            scaler.unscale_(moves)
            nn.utils.clip_grad_norm_(weights, 2 * clip if wrong == "clip" else clip)
        scaler.step(moves)
        scaler.update()
        with torch.no_grad():
            for m, w in zip(means, weights):
                if wrong != "ema":
                    m.copy_(EMA * m + (1 - EMA) * w)
        for key in torch.cat(keys[: 1 if wrong == "queue" else 2]):
            rows[at % len(rows)] = key
            at += 1
        losses.append(total)
    return dict(
        losses=losses,
        weights=flat(weights),
        ema=flat(means),
        statistics=flat(b for b in net.buffers() if b.is_floating_point()),
        scale=scaler.get_scale() if scaler.is_enabled() else None,
    )


# ---- how far they are from one another


def distances(got, want, cfg):
    """Relative: of the losses of the first step and of the others; of how far the weights and
    the EMA's have moved, and of the running statistics."""
    start = flat(student(cfg).parameters())
    off = [abs(a - b) / abs(b) for a, b in zip(got["losses"], want["losses"], strict=True)]
    far = {"first loss": off[0], "losses": max(off[1:])}
    for key in ("weights", "ema"):
        a, b = got[key] - start, want[key] - start
        far[key] = (np.linalg.norm(a - b) / np.linalg.norm(b)).item()
    a, b = got["statistics"], want["statistics"]
    far["statistics"] = (np.linalg.norm(a - b) / np.linalg.norm(b)).item()
    return far


# What rounding leaves: of float32 with another order of additions, and of half precision.
EXACT = {"first loss": 1e-5, "losses": 1e-4, "weights": 1e-3, "ema": 1e-3, "statistics": 1e-4}
ACROSS = {"first loss": 1e-4, "losses": 2e-3, "weights": 2e-2, "ema": 2e-2, "statistics": 1e-3}
ROUNDED = {"first loss": 5e-3, "losses": 1.5e-2, "weights": 0.15, "ema": 0.15, "statistics": 0.04}


def beyond(got, want, cfg, limits):
    far = distances(got, want, cfg)
    print(far)
    return {name: value for name, value in far.items() if not value <= limits[name]}


def check_layout_and_optimizer(got, optimizer, fused):
    moments = {"sgd": 1, "adamw": 2}[optimizer]
    convolutions = sum(p.dim() == 4 for p in student(configuration("sgd", "fp32", 0)).parameters())
    assert got["fused"] == fused and got["channels_last"]
    assert got["moments"] == moments * convolutions > 0


@pytest.mark.parametrize(
    "optimizer, precision, clip, fused",
    [
        ("sgd", "fp32", CLIP, True),
        ("adamw", "fp32", 0, False),
        ("sgd", "bf16", 0, True),
        ("adamw", "bf16", CLIP, True),
    ],
)
def test_losses_and_weights_are_those_of_plain_torch(optimizer, precision, clip, fused):
    cfg = configuration(optimizer, precision, clip)
    got = ranks(1, ours, "cpu", optimizer, precision, clip, fused)[0]
    want = plain(CPU, optimizer, precision, clip, got["queue"])
    assert beyond(got, want, cfg, EXACT if precision == "fp32" else ROUNDED) == {}
    check_layout_and_optimizer(got, optimizer, fused)


FAULTS = [
    (wrong, optimizer, precision)
    for optimizer, precision in (("sgd", "fp32"), ("sgd", "bf16"), ("adamw", "bf16"))
    for wrong in ("accumulate", "clip", "ema", "momentum", "queue")
    if optimizer == "sgd" or wrong not in ("clip", "momentum")
]


@pytest.mark.parametrize("wrong, optimizer, precision", FAULTS)
def test_each_fault_of_a_step_shows(wrong, optimizer, precision):
    """In the losses after the first, or in the weights; the first loss knows nothing of any.

    AdamW's own factors show in float32, and beside the form that is not fused (test_step.py)."""
    cfg = configuration(optimizer, precision, CLIP)
    queue = np.random.default_rng(1).normal(size=(48, DIM)).astype(np.float32)
    queue /= np.linalg.norm(queue, axis=1, keepdims=True)
    # Shortened to the same norm, gradients of twice the size would be the same.
    clip = CLIP if wrong == "clip" else 0
    right, bad = (plain(CPU, optimizer, precision, clip, queue, how) for how in ("", wrong))
    found = beyond(bad, right, cfg, EXACT if precision == "fp32" else ROUNDED)
    assert found.keys() & {"losses", "weights", "ema"} and "first loss" not in found


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "optimizer, precision, clip",
    [
        ("sgd", "fp32", CLIP),
        ("adamw", "fp32", 0),
        ("sgd", "bf16", 0),
        ("adamw", "bf16", CLIP),
        ("sgd", "fp16", 0),
        ("sgd", "fp16", CLIP),
        ("adamw", "fp16", 0),
    ],
)
def test_a_gpus_losses_and_weights_are_those_of_plain_torch(
    optimizer, precision, clip, monkeypatch
):
    for what in (torch.backends.cudnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(what, "allow_tf32", False)
    cfg = configuration(optimizer, precision, clip)
    got = ranks(1, ours, "cuda", optimizer, precision, clip, False)[0]
    there = plain(torch.device("cuda", 0), optimizer, precision, clip, got["queue"])
    assert beyond(got, there, cfg, ACROSS if precision == "fp32" else ROUNDED) == {}
    if precision == "fp32":
        assert beyond(got, plain(CPU, optimizer, precision, clip, got["queue"]), cfg, ACROSS) == {}
    # fp16: both scalers have seen the same gradients overflow, and skipped the same steps.
    assert got["scale"] == there["scale"] and (got["scale"] is None) == (precision != "fp16")
    check_layout_and_optimizer(got, optimizer, fused=True)


# ---- the real command


def logged(folder, tmp_path, name, env, *overrides):
    """Losses 1 to 5 that the real command logs, with two micro batches a step."""
    overrides = (
        f"run.name={name}",
        "run.max_steps=5",
        "data.accumulate=2",
        # Views that differ by a rounding alone between the devices; no random state of the device.
        "data.decode=cpu",
        "data.augment=cpu",
        # A network whose losses repeat to 1e-6 where a CPU adds in another order.  Of the other
        # small one, with batch norms over few values, the second loss is 4 % off then.
        "student.arch=test_resnet",
        "student.kwargs={}",
        "bn.groups=1",
        "optim.lr=0.01",
        "engine.tf32=false",
        "method.queue_dtype=fp32",
        *overrides,
    )
    run(sys.executable, ROOT / "fastdisco/train.py", *tiny(folder, tmp_path, *overrides), env=env)
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    return [x["train/loss"] for x in map(json.loads, lines) if "train/loss" in x]


def test_two_micro_batches_log_the_losses_that_repeat(folder, tmp_path):
    """The twin below, with the CPU on both sides: the command itself adds no difference."""
    a, b = (logged(folder, tmp_path, name, {"CUDA_VISIBLE_DEVICES": ""}) for name in "ab")
    assert a == b and len(a) == 5 and len(set(a)) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_command_logs_on_a_gpu_what_it_logs_on_a_cpu(folder, tmp_path, precision):
    there = logged(folder, tmp_path, "gpu", {}, f"engine.precision={precision}")
    here = logged(folder, tmp_path, "cpu", {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})
    assert len(there) == len(here) == 5
    # Rounding grows from step to step: on an H100 the fifth loss in float32 was 4e-3 off, the others
    # less than 1e-3.
    assert there[:4] == pytest.approx(here[:4], rel=2e-3 if precision == "fp32" else 5e-2)
