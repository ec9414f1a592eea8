"""Parameter groups, optimizer and schedules."""

import inspect
import math

import timm.optim
import torch
from torch import Tensor, nn

from fastdisco.common.errors import UserError
from fastdisco.config import Optim


def create(net: nn.Module, cfg: Optim, lr: float, stage: int = 0) -> torch.optim.Optimizer:
    """The optimizer of that name from timm.optim (which knows torch's, and NVIDIA apex's where that
    is installed).

    stage  of ZeRO.  Raises UserError where the optimizer would go wrong with it, which nothing else
           would say"""
    if stage and not _elementwise(cfg, next(net.parameters()).device):
        raise UserError(
            f"optim.name: {cfg.name} moves an element of a tensor by more than its own gradient, by "
            f"the tensor's norm for example, and ZeRO stage {stage} would give it flat pieces of "
            "many tensors; set engine.stage=0 or take another, as sgd or adamw"
        )
    optimizer = _make(net, cfg, lr)
    if cfg.clip_each and cfg.clip:
        # Averaged gradients, once a step; fp16's scaler leaves them scaled for a fused optimizer,
        # which unscales by itself.
        def clip(optimizer, *_):
            scale = getattr(optimizer, "grad_scale", None)
            clip_each(net, cfg.clip if scale is None else cfg.clip * scale)

        optimizer.register_step_pre_hook(clip)
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults.get("fused") and cfg.momentum:
        optimizer.register_step_pre_hook(_momentum)
    return optimizer


def base_lr(cfg: Optim, batch: int) -> float:
    """Learning rate before the schedule, under the scaling rule; `batch` is the global batch."""
    return (
        cfg.lr * {"none": 1.0, "linear": batch / 256, "sqrt": math.sqrt(batch / 256)}[cfg.lr_scale]
    )


def rate(cfg: Optim, lr: float, epoch: float, epochs: int) -> float:
    """The learning rate at a fractional epoch, `lr` being the base's: linear warm-up, then the
    schedule over the rest, a cosine down to lr_min."""
    low = 0.0 if epoch < cfg.warmup_epochs else cfg.lr_min
    return low + (lr - low) * lr_factor(cfg, epoch, epochs)


def lr_factor(cfg: Optim, epoch: float, epochs: int) -> float:
    """0..1 of the way between the schedule's end and its start."""
    epoch = _at(cfg, epoch)
    if epoch < cfg.warmup_epochs:
        return (
            epoch / cfg.warmup_epochs
            if cfg.per == "step"
            else (epoch + 1) / (cfg.warmup_epochs + 1)
        )
    if cfg.schedule == "cosine":
        return 0.5 * (
            1 + math.cos(math.pi * (epoch - cfg.warmup_epochs) / (epochs - cfg.warmup_epochs))
        )
    if cfg.schedule == "step":
        return 0.1 ** sum(epoch >= m for m in cfg.milestones)
    return 1.0


def decay(cfg: Optim, epoch: float, epochs: int) -> float:
    """The weight decay at a fractional epoch: a cosine from weight_decay to weight_decay_end, where
    there is one."""
    if cfg.weight_decay_end is None:
        return cfg.weight_decay
    return cfg.weight_decay_end + (cfg.weight_decay - cfg.weight_decay_end) * 0.5 * (
        1 + math.cos(math.pi * _at(cfg, epoch) / epochs)
    )


def move(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float):
    """Sets both, but no decay for weights that have none."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay


def freeze(net: nn.Module, prefixes: tuple[str, ...]):
    """Between backward and step: drops the gradients of weights whose names begin so, and with them
    this step's decay and momentum."""
    for name, p in net.named_parameters() if prefixes else ():
        if name.startswith(prefixes):
            p.grad = None


def clip_each(net: nn.Module, norm: float):
    """Shortens every weight tensor's gradient that is longer than the norm, each by itself, in
    place."""
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    torch._foreach_mul_(
        grads, list((norm / (torch.stack(torch._foreach_norm(grads)) + 1e-6)).clamp(max=1))
    )


def _momentum(optimizer: torch.optim.Optimizer, *_):
    """Zeros where there is no momentum yet, which give the first step that torch gives.

    Fused SGD takes memory as it finds it, and keeps that where fp16's first step overflows; a
    weight that thaws later it cannot take at all."""
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if optimizer.state[p].get("momentum_buffer") is None:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _at(cfg: Optim, epoch: float) -> float:
    return math.floor(epoch) if cfg.per == "epoch" else epoch


def _make(params: nn.Module | list[Tensor], cfg: Optim, lr: float) -> torch.optim.Optimizer:
    # Timm's "sgd" is Nesterov's; MoCo's and DisCo's is plain.
    name = {"sgd": "momentum", "nesterov": "sgd"}.get(cfg.name, cfg.name)
    weights = params.parameters() if isinstance(params, nn.Module) else params
    try:
        return timm.optim.create_optimizer_v2(
            params,
            name,
            lr=lr,
            momentum=cfg.momentum,
            weight_decay=cfg.weight_decay,
            filter_bias_and_bn=not cfg.decay_norm_and_bias,
            **_fused(name, next(iter(weights)).device),
        )
    except (ValueError, AssertionError, TypeError, ImportError) as e:
        raise UserError(
            f"optim.name: timm.optim cannot make {cfg.name!r} ({e}); take one of "
            "timm.optim.list_optimizers()"
        ) from None


def _fused(name: str, device: torch.device) -> dict[str, bool]:
    """What makes the optimizer of that name in timm.optim one kernel for many weights: torch's SGD,
    Adam, AdamW and Adagrad on a GPU.

    The others of torch, and some of timm's, take lists of weights (foreach) without being told.
    Fused ones never wait for the GPU, also not for fp16's loss scaler, which asks others each step
    whether a gradient overflowed."""
    if device.type != "cuda" or name.lower() not in timm.optim.list_optimizers():
        return {}
    return (
        {"fused": True}
        if "fused"
        in inspect.signature(
            timm.optim.get_optimizer_class(name.lower(), bind_defaults=False)
        ).parameters
        else {}
    )


def _elementwise(cfg: Optim, device: torch.device) -> bool:
    """Whether three steps on two matrices end where they do on the same elements cut elsewhere, as
    ZeRO cuts them."""
    g = torch.Generator().manual_seed(0)
    # Adafactor and Muon take much smaller ones for vectors.
    start = torch.randn(2, 32, 32, generator=g) * torch.tensor([0.1, 0.8]).view(2, 1, 1)
    grads = torch.randn(3, 2, 32, 32, generator=g)
    # As before a batch norm: AdamP looks.
    grads -= (
        (grads * start).sum((2, 3), keepdim=True) / start.square().sum((1, 2), keepdim=True) * start
    )
    ends = []
    for cuts, shape in (((1024, 1024), (32, 32)), ((1100, 948), (-1,))):
        parts = [
            x.to(device).view(shape).clone().requires_grad_() for x in start.flatten().split(cuts)
        ]
        # Without decay LARS does not adapt.
        opt = _make(parts, cfg.model_copy(update={"weight_decay": 0.1}), 0.1)
        for grad in grads:
            for x, d in zip(parts, grad.flatten().split(cuts)):
                x.grad = d.to(device).view(shape)
            try:
                opt.step()
            except RuntimeError:  # AdaHessian asks for second derivatives
                return False
        ends.append(torch.cat([x.detach().flatten() for x in parts]))
    return torch.allclose(*ends, rtol=1e-4, atol=1e-6)
