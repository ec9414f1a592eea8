"""The network of a configuration, or of a timm name and a head."""

from collections.abc import Callable
from typing import Any

from torch import nn

from fastdisco import config
from fastdisco.models import heads
from fastdisco.models.backbones import backbone
from fastdisco.models.batchnorm import split_bn, sync_bn
from fastdisco.models.net import Net


def of(cfg: config.Config, train: bool = False) -> Net:
    """The student that a configuration describes, its weights drawn from torch's global generator.

    train  its batch norms are split or synchronised as `bn` says.  Raises UserError where the arch
           does not exist or cannot do what is asked"""
    s, count = cfg.student, getattr(cfg.method, "prototypes", 0)
    head = {"mlp": heads.mlp, "dino": heads.dino_mlp}[s.head]
    sizes = dict.fromkeys([*(c.size for c in config.crops(cfg)), cfg.data.eval_size])
    net = create(
        s.arch, lambda dim: head(dim, s.hidden, s.dim, s.head_bn), s.kwargs, sizes=tuple(sizes)
    )
    if count:
        net.prototypes, net.joint = (
            heads.Prototypes(s.dim, count, not getattr(cfg.method, "norm_last_layer", True)),
            True,
        )
    if train:
        split_bn(net, cfg.bn.groups)
        net = sync_bn(net) if cfg.bn.sync else net
    return net


def create(
    arch: str,
    head: Callable[[int], nn.Module],
    kwargs: dict[str, Any] = {},
    sizes: tuple[int, ...] = (),
) -> Net:
    """A Net, its weights drawn from torch's global generator (timm's initialisation, torch's for
    the head).

    arch    a name of timm's, or one of WIDE
    head    makes the head for the backbone's number of features
    kwargs  for timm.create_model
    sizes   of the images, pixels: position embeddings are made for the first and interpolated for
    the others; (): the arch's own Raises UserError for a name, a keyword or a size that timm cannot
    make."""
    body = backbone(arch, kwargs, sizes)
    # num_features is what mobilenetv3 has before its head convolution.
    return Net(body, head(body.head_hidden_size))
