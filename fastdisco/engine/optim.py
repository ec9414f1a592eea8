"""Optimizers, and the schedules of learning rate and weight decay.

An epoch is a fraction here: 1.5 is half way through the second."""

import inspect
import math
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn

from fastdisco.common.errors import UserError
from fastdisco.config import Optim
from fastdisco.engine import unit_rows


def create(net: nn.Module, cfg: Optim, lr: float, stage: int = 0) -> torch.optim.Optimizer:
    """The optimizer `cfg.name` of timm.optim, which has torch's, too, and those of NVIDIA apex where
    it is installed.

    lr     the rate that it starts with
    stage  of ZeRO
    Raises UserError for an unknown name, and for an optimizer that would silently go wrong with
    that stage."""
    if stage and not _elementwise(cfg, next(net.parameters()).device):
        raise UserError(
            f"optim.name: {cfg.name} moves an element of a tensor by more than its own gradient, "
            f"by the tensor's norm for example, and ZeRO stage {stage} would give it flat pieces of "
            "many tensors; set engine.stage=0 or take another, as sgd or adamw"
        )
    optimizer = _make(net, cfg, lr)
    if cfg.clip_each and cfg.clip:
        # Before the step the gradients are averaged over ranks and micro batches.
        def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            # fp16's scaler leaves the gradients of a fused optimizer scaled; it unscales them
            # itself.
            scale = getattr(optimizer, "grad_scale", None)
            clip_each(net, cfg.clip if scale is None else cfg.clip * scale)

        optimizer.register_step_pre_hook(clip)
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults.get("fused") and cfg.momentum:
        optimizer.register_step_pre_hook(_zero_momentum)
    if not stage:
        # From stage 1 on the optimizer gets other tensors, which the engine knows.
        unit_rows.keep(net, optimizer)
    return optimizer


# ---- schedules


def base_lr(cfg: Optim, batch: int) -> float:
    """The learning rate that the schedule starts from; `batch` is the global batch."""
    return cfg.scaled(batch)


def rate(cfg: Optim, lr: float, epoch: float, epochs: int) -> float:
    """The learning rate at an epoch: a linear warm-up to `lr`, then the schedule.  A cosine ends at
    lr_min.

    lr  what `base_lr` gives for the same `cfg`"""
    first = cfg.lr if cfg.warmup_from == "lr" else 0.0
    low = first if _at(cfg, epoch) < cfg.warmup_epochs else cfg.lr_min
    return low + (lr - low) * lr_factor(cfg, epoch, epochs)


def lr_factor(cfg: Optim, epoch: float, epochs: int) -> float:
    """Where the learning rate is between its lowest value (0) and its highest (1)."""
    epoch, warmup = _at(cfg, epoch), cfg.warmup_epochs
    if epoch < warmup:
        if cfg.per == "epoch" and cfg.warmup_from == "zero":
            # An epoch at 0 would train nothing, so this warm-up has one step more.
            return (epoch + 1) / (warmup + 1)
        return epoch / warmup
    if cfg.schedule == "cosine":
        start = warmup if cfg.cosine_from == "warmup" else 0.0
        return _cosine(epoch - start, epochs - start)
    if cfg.schedule == "step":
        return 0.1 ** sum(epoch >= m for m in cfg.milestones)
    return 1.0


def decay(cfg: Optim, epoch: float, epochs: int) -> float:
    """The weight decay at an epoch: weight_decay, or a cosine from it to weight_decay_end."""
    end = cfg.weight_decay_end
    if end is None:
        return cfg.weight_decay
    return end + (cfg.weight_decay - end) * _cosine(_at(cfg, epoch), epochs)


def move(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Sets learning rate and weight decay.  Groups without weight decay keep none."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay


def _at(cfg: Optim, epoch: float) -> float:
    """The epoch at which the schedule is read."""
    return math.floor(epoch) if cfg.per == "epoch" else epoch


def _cosine(at: float, end: float) -> float:
    """Half a cosine: 1 at 0, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * at / end))


# ---- gradients, between backward and step


def freeze(net: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Drops the gradients of the weights whose names begin with a prefix.

    Without gradient a weight gets no weight decay and no momentum either in this step."""
    for name, p in net.named_parameters() if prefixes else ():
        if name.startswith(prefixes):
            p.grad = None


def clip_each(net: nn.Module, norm: float | Tensor) -> None:
    """Shortens every weight tensor's gradient to the norm, if it is longer, each by itself, in
    place."""
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    factors = norm / (torch.stack(torch._foreach_norm(grads)) + 1e-6)
    torch._foreach_mul_(grads, list(factors.clamp(max=1)))


def _zero_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Gives weights that have no momentum yet zeros, from which the first step is torch's own.

    Fused SGD would start from uninitialised memory, and keeps it where fp16's first step overflows.
    It cannot take a weight at all that got its first gradient later than others."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


# ---- making an optimizer


def _make(params: nn.Module | list[Tensor], cfg: Optim, lr: float) -> torch.optim.Optimizer:
    # timm's "sgd" is Nesterov's; that of MoCo and DisCo is plain.
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


def _fused(name: str, device: torch.device) -> dict[str, Any]:
    """The argument that makes one kernel move many weights, for those that have it: torch's SGD,
    Adam, AdamW and Adagrad on a GPU.

    torch's others, and some of timm's, work on lists of weights (foreach) without being asked.
    Fused ones never wait for the GPU.  The others do with fp16, whose loss scaler asks in each step
    whether a gradient overflowed."""
    if device.type != "cuda" or name.lower() not in timm.optim.list_optimizers():
        return {}
    kind = timm.optim.get_optimizer_class(name.lower(), bind_defaults=False)
    return {"fused": True} if "fused" in inspect.signature(kind).parameters else {}


# ---- whether ZeRO may cut its tensors


def _elementwise(cfg: Optim, device: torch.device) -> bool:
    """Whether the optimizer moves each element by its own gradient alone.

    It takes three steps on two matrices, and on the same elements cut elsewhere, as ZeRO cuts them:
    both must end alike."""
    g = torch.Generator().manual_seed(0)
    # Not much smaller than 32 x 32: Adafactor and Muon would treat the matrices as vectors.
    start = torch.randn(2, 32, 32, generator=g) * torch.tensor([0.1, 0.8]).view(2, 1, 1)
    grads = torch.randn(3, 2, 32, 32, generator=g)
    # Orthogonal to the weights, as before a batch norm: AdamP acts on such gradients alone.
    along = (grads * start).sum((2, 3), keepdim=True)
    length = start.square().sum((1, 2), keepdim=True)
    grads -= along / length * start
    # LARS adapts only with weight decay.
    cfg = cfg.model_copy(update={"weight_decay": 0.1})
    whole = _steps(cfg, device, start, grads, cuts=(1024, 1024), shape=(32, 32))
    pieces = _steps(cfg, device, start, grads, cuts=(1100, 948), shape=(-1,))
    if whole is None or pieces is None:
        return False
    return torch.allclose(whole, pieces, rtol=1e-4, atol=1e-6)


def _steps(
    cfg: Optim,
    device: torch.device,
    start: Tensor,
    grads: Tensor,
    cuts: tuple[int, ...],
    shape: tuple[int, ...],
) -> Tensor | None:
    """All elements, flat, after a step for each of `grads`, taken on tensors of that shape and of
    `cuts` elements; None where the optimizer cannot take a plain step."""
    flat = start.flatten().split(cuts)
    parts = [x.to(device).view(shape).clone().requires_grad_() for x in flat]
    optimizer = _make(parts, cfg, 0.1)
    for grad in grads:
        for part, piece in zip(parts, grad.flatten().split(cuts)):
            part.grad = piece.to(device).view(shape)
        try:
            optimizer.step()
        # AdaHessian asks for second derivatives.
        except RuntimeError:
            return None
    return torch.cat([part.detach().flatten() for part in parts])
