"""Parameter groups, optimizer and learning-rate schedule."""
import math

import timm.optim
import torch
from torch import nn

from fastdisco.config import Optim, UserError


def create(net: nn.Module, cfg: Optim, lr: float) -> torch.optim.Optimizer:
    """The optimizer of that name from timm.optim (which knows torch's, and NVIDIA apex's where that is installed)."""
    name = {"sgd": "momentum", "nesterov": "sgd"}.get(cfg.name, cfg.name)  # timm's "sgd" is Nesterov's; MoCo's and DisCo's is plain
    try:
        return timm.optim.create_optimizer_v2(net, name, lr=lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay,
                                              filter_bias_and_bn=not cfg.decay_norm_and_bias)
    except (ValueError, AssertionError, TypeError, ImportError) as e:
        raise UserError(f"optim.name: timm.optim cannot make {cfg.name!r} ({e}); take one of timm.optim.list_optimizers()") from None


def base_lr(cfg: Optim, batch: int) -> float:
    """Learning rate before the schedule, under the scaling rule; `batch` is the global batch."""
    return cfg.lr * {"none": 1.0, "linear": batch / 256, "sqrt": math.sqrt(batch / 256)}[cfg.lr_scale]


def lr_factor(cfg: Optim, epoch: float, epochs: int) -> float:
    """What base_lr is multiplied by at a fractional epoch: linear warm-up, then the schedule over the rest."""
    if cfg.per == "epoch":
        epoch = math.floor(epoch)
    if epoch < cfg.warmup_epochs:
        return epoch / cfg.warmup_epochs if cfg.per == "step" else (epoch + 1) / (cfg.warmup_epochs + 1)
    if cfg.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (epoch - cfg.warmup_epochs) / (epochs - cfg.warmup_epochs)))
    if cfg.schedule == "step":
        return 0.1 ** sum(epoch >= m for m in cfg.milestones)
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
