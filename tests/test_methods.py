"""What all methods share: half precision near full, and a GPU that agrees with the CPU and is never
waited for."""

import pytest
import torch

from fastdisco import config, engine, methods, models
from fastdisco.engine import optim
from fastdisco.methods import Nets, Progress
from fastdisco.models import heads
from fastdisco.teacher import Options, Teacher

BASE = {
    "run": {"name": "x"},
    "data": {"train": "t", "batch": 8, "eval_size": 32},
    "teacher": {"file": "t"},
    "optim": {"name": "sgd", "lr": 0.01, "warmup_epochs": 0, "clip_each": True, "clip": 1.0},
}
LARGE_AND_SMALL = [{"count": 2, "size": 64}, {"count": 2, "size": 32}]
CASES = {
    "moco": dict(
        method={
            "name": "moco",
            "queue": 24,
            "queue_dtype": "fp32",
            "rkd": {"distance": 1, "angle": 1},
        }
    ),
    "swav": dict(
        method={
            "name": "swav",
            "queue": 8,
            "queue_epoch": 0,
            "prototypes": 40,
            "freeze_steps": 1,
            "distill": 1.0,
        },
        views=LARGE_AND_SMALL,
    ),
    "dino": dict(
        method={"name": "dino", "prototypes": 64, "freeze_epochs": 1},
        views=LARGE_AND_SMALL,
        student={"kwargs": {"drop_path_rate": 0.0}},
    ),
    "seed": dict(
        method={"name": "seed", "queue": 24, "queue_dtype": "fp32", "contrast": 1.0},
        views=[{"count": 2}],
    ),
}


def losses(name, device, precision="fp32"):
    """Of three steps, the third with the swav queue in use; on a GPU it may not wait for
    anything."""
    case = CASES[name]
    cfg = config.validate(
        BASE | case | {"student": {"arch": "test_resnet", "hidden": 32} | case.get("student", {})},
        "test",
    )
    torch.manual_seed(0)
    net = models.of(cfg, train=True).to(device)
    teacher = Teacher(
        models.create("test_resnet", lambda dim: heads.mlp(dim, 32, cfg.student.dim)),
        Options(device),
    )
    method = methods.create(
        cfg.method.name, cfg=cfg.method, dim=cfg.student.dim, seed=0, shuffle="off"
    ).to(device)
    ema = None if method.momentum(Progress(0, 0.0)) is None else models.ema_copy(net)
    optimizer = optim.create(net, cfg.optim, 0.01)
    cast = lambda f: engine.autocast(precision, device)(f)
    nets = Nets(
        cast(net), *(n and cast(torch.no_grad()(n)) for n in (ema, teacher, net.prototypes))
    )
    found, views = (
        [],
        [
            [torch.randn(8, 3, c.size, c.size).to(device) for c in config.crops(cfg)]
            for _ in range(3)
        ],
    )
    for step in range(3):
        if device.type == "cuda" and step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            progress = Progress(step, step / 9, step / 2, step)
            terms = method.step(nets, views[step], progress)
            loss = method.loss(terms)
            optimizer.zero_grad()
            loss.backward()
            optim.freeze(net, method.frozen(progress))
            optimizer.step()
            if ema:
                models.ema_update(ema, net, method.momentum(progress))
            method.after_step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        found.append(loss.detach())
    return torch.stack(found).tolist()


@pytest.mark.parametrize("name", CASES)
def test_bf16_is_near_fp32(name):
    cpu = torch.device("cpu")
    full, half = losses(name, cpu), losses(name, cpu, "bf16")
    assert half == pytest.approx(full, rel=5e-2) and half != full


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_agrees_with_the_cpu_and_is_not_waited_for(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert losses(name, torch.device("cuda")) == pytest.approx(
        losses(name, torch.device("cpu")), rel=2e-2
    )
