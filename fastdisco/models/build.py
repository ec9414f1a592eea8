"""The network of a configuration, or of an architecture and a head."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from fastdisco import config
from fastdisco.common.errors import UserError
from fastdisco.models import heads
from fastdisco.models.backbones import backbone
from fastdisco.models.batchnorm import split_bn, sync_bn
from fastdisco.models.net import Net


def of(cfg: config.Config, train: bool = False) -> Net:
    """The student of a configuration, its weights drawn from torch's global generator.

    train  split or synchronise its batch norms as the block `bn` says
    Raises UserError where the architecture does not exist or cannot do what is asked."""
    student = cfg.student
    head = {"mlp": heads.mlp, "dino": heads.dino_mlp}[student.head]
    # Each size once, the crops' first: position embeddings are made for the first.
    sizes = dict.fromkeys([*(crop.size for crop in config.crops(cfg)), cfg.data.eval_size])
    net = create(
        student.arch,
        lambda dim: head(dim, student.hidden, student.dim, student.head_bn),
        student.kwargs,
        tuple(sizes),
    )
    # Methods with prototypes (SwAV, DINO) run all crops of a resolution in one forward.
    if count := getattr(cfg.method, "prototypes", 0):
        net.prototypes = _prototypes(cfg, count)
        net.joint = True
    if train and student.kwargs:
        _try_training(cfg, tuple(sizes))
    if train:
        split_bn(net, cfg.bn.groups)
        if cfg.bn.sync:
            net = cast(Net, sync_bn(net))
    return net


def _try_training(cfg: config.Config, sizes: tuple[int, ...]) -> None:
    """Raises UserError where the student's further arguments let timm make it, but not train it.

    A network like it is tried on the meta device, without memory or draws of the training's.  Some
    networks look at values, which that device does not have: they are tried on the CPU."""
    failed: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            _one_step(cfg, sizes, device)
            return
        # timm's code raises what it likes.
        except Exception as e:
            failed = e
    student, why = cfg.student, (str(failed) or type(failed).__name__).splitlines()[0][:200]
    raise UserError(
        f"student.kwargs: {student.arch} cannot be trained with {student.kwargs} ({why}); correct or "
        "remove them"
    ) from failed


def _one_step(cfg: config.Config, sizes: tuple[int, ...], device: str) -> None:
    """Two images through a student that learns."""
    linear = lambda dim: nn.Linear(dim, 1)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        net = create(cfg.student.arch, linear, cfg.student.kwargs, sizes).train()
        net([torch.zeros(2, 3, min(sizes), min(sizes))])


def _prototypes(cfg: config.Config, count: int) -> heads.Prototypes:
    if isinstance(cfg.method, config.Dino):
        return heads.LastLayer(cfg.student.dim, count, gain=not cfg.method.norm_last_layer)
    return heads.Prototypes(cfg.student.dim, count)


def create(
    arch: str,
    head: Callable[[int], nn.Module],
    kwargs: dict[str, Any] | None = None,
    sizes: tuple[int, ...] = (),
) -> Net:
    """A Net whose weights are drawn from torch's global generator: the backbone's by timm's
    initialisation, the head's as the head makes them.

    head    makes the head for the backbone's number of features
    arch, kwargs, sizes and errors are those of `backbone`."""
    body = backbone(arch, kwargs or {}, sizes)
    # Not `num_features`, which for mobilenetv3 is the width before its head convolution.
    features = cast(int, body.head_hidden_size)
    return Net(body, head(features))
