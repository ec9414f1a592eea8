"""Backbones: timm's, and SwAV's widened ResNets."""

import difflib
import functools
from typing import Any

import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from fastdisco.common.errors import UserError

# SwAV's ResNet-50 with every width multiplied (arXiv:2006.09882); timm's wide_resnet50_2 widens the
# inner convolutions alone.
WIDE = {"resnet50w2": 2, "resnet50w4": 4, "resnet50w5": 5}
_OURS = {
    "num_classes": "the head is ours",
    "in_chans": "images have 3 channels",
    "features_only": "the pooled features are used",
    "pretrained": "training starts from random weights",
    "checkpoint_path": "training starts from random weights",
}


@functools.cache
def shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights and buffers of an architecture's backbone, which is made
    without memory."""
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in backbone(arch, {}).state_dict().items()}


def backbone(arch: str, kwargs: dict[str, Any], sizes: tuple[int, ...] = ()) -> nn.Module:
    if not timm.is_model(arch) and arch not in WIDE:
        near = difflib.get_close_matches(arch, [*WIDE, *timm.list_models()], 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names all"
        raise UserError(f"arch: timm {timm.__version__} has no model '{arch}'; {hint}")
    for key in kwargs:
        if key in _OURS:
            raise UserError(
                f"kwargs: {key} of {arch} is not for you to set ({_OURS[key]}); remove it"
            )
    own = arch not in WIDE and timm.get_pretrained_cfg(arch)
    fixed = own and own.fixed_input_size  # transformers, whose positions have embeddings
    make = lambda **more: timm.create_model(arch, pretrained=False, num_classes=0, **more | kwargs)
    try:
        if arch in WIDE:
            return _wide(WIDE[arch], kwargs)
        if not fixed or {*sizes} <= {own.input_size[-1]}:
            return make()
        try:
            net = make(img_size=sizes[0], dynamic_img_size=True)
        except TypeError as e:
            if "dynamic_img_size" not in str(e):
                raise
            net = make(img_size=sizes[0])  # XCiT: computed from the positions, so of any size
    except Exception as e:  # whatever the constructor trips over
        raise UserError(
            f"kwargs: timm cannot make {arch} with {kwargs} ({type(e).__name__}: {e}); correct or "
            "remove them"
        ) from e
    for size in dict.fromkeys(sizes):
        try:
            with torch.no_grad():
                net.eval()(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as e:
            raise UserError(
                f"student.arch: {arch} cannot take crops of {size} px ({e}); set view.size, views "
                "and data.eval_size to what it can, or take another"
            ) from e
    return net.train()


def _wide(times: int, kwargs: dict[str, Any]) -> nn.Module:
    width = 64 * times
    net = ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        channels=tuple(width * 2**i for i in range(4)),
        num_classes=0,
        **kwargs,
    )
    # Timm's stem has 64 channels at any width: replaced, with what reads it, and drawn as timm
    # draws its own.
    first = net.layer1[0]
    net.conv1, net.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
    first.conv1, first.downsample[0] = (
        nn.Conv2d(width, c, 1, bias=False) for c in (width, 4 * width)
    )
    for conv in (net.conv1, first.conv1, first.downsample[0]):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return net
