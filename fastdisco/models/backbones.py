"""Backbones: timm's, and SwAV's widened ResNets."""

import difflib
import functools
from typing import Any, cast

import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from fastdisco.common.errors import UserError

# SwAV's ResNet-50 with every width multiplied by this (arXiv:2006.09882).  timm's wide_resnet50_2
# is another network: it widens the inner convolutions alone.
WIDE = {"resnet50w2": 2, "resnet50w4": 4, "resnet50w5": 5}

# Arguments of timm.create_model that a configuration must not set, and why.
_OURS = {
    "num_classes": "the head is ours",
    "in_chans": "images have 3 channels",
    "features_only": "the pooled features are used",
    "pretrained": "training starts from random weights",
    "pretrained_cfg": "training starts from random weights",
    "pretrained_cfg_overlay": "training starts from random weights",
    "checkpoint_path": "training starts from random weights",
}

_NEVER_LOADED = (
    "which are never loaded (a student starts from random weights, and a teacher's are those of its "
    "file)"
)


def backbone(arch: str, kwargs: dict[str, Any], sizes: tuple[int, ...] = ()) -> nn.Module:
    """A network without classifier, [B,3,S,S] -> [B,F], in training mode.

    Its weights are drawn from torch's global generator by timm's initialisation.  F is its
    attribute `head_hidden_size`.

    arch    a name of timm's, or a key of WIDE
    kwargs  further arguments of timm.create_model; they win over ours
    sizes   sides of the images that it will get, pixels.  A transformer is made with position
            embeddings for the first and interpolates them for the others; (): the architecture's
    Raises UserError for an unknown name or one of pretrained weights, an argument that timm refuses
    or that is not the user's to set, and a size that the network cannot take."""
    _check(arch, kwargs)
    try:
        if arch in WIDE:
            return _widened(WIDE[arch], kwargs)
        fixed = _fixed_size(arch)
        if fixed is None or {*sizes} <= {fixed}:
            return _timm(arch, kwargs)
        net = _for_sizes(arch, kwargs, sizes[0])
    # Whatever the constructor trips over.
    except Exception as e:
        raise UserError(
            f"kwargs: timm cannot make {arch} with {kwargs} ({type(e).__name__}: {e}); correct or "
            "remove them"
        ) from e
    _try_sizes(net, arch, sizes)
    return net.train()


@functools.cache
def shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights and buffers of an architecture's backbone.

    The network is made on the meta device, without memory."""
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in backbone(arch, {}).state_dict().items()}


def _check(arch: str, kwargs: dict[str, Any]) -> None:
    _refuse_weights(arch)
    if not timm.is_model(arch) and arch not in WIDE:
        near = difflib.get_close_matches(arch, [*WIDE, *timm.list_models()], 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names all"
        raise UserError(f"arch: timm {timm.__version__} has no model '{arch}'; {hint}")
    for key in kwargs:
        if key in _OURS:
            raise UserError(
                f"kwargs: {key} of {arch} is not for you to set ({_OURS[key]}); remove it"
            )


def _refuse_weights(arch: str) -> None:
    """Refuses timm's names of pretrained weights, which would promise what nobody loads: a tag, as
    in resnet18.a1_in1k; the Hub, as in hf-hub:timm/resnet18.a1_in1k; a folder, as in local-dir:X."""
    source, colon, path = arch.rpartition(":")
    name, dot, tag = path.rpartition("/")[2].partition(".")
    known = timm.is_model(name) or name in WIDE
    if colon:
        write = f"the name of the architecture alone{f', {name}' if known else ''}"
        raise UserError(
            f"arch: timm {timm.__version__} has no model '{arch}', and {source}: means weights, "
            f"{_NEVER_LOADED}; write {write}"
        )
    if dot and known:
        raise UserError(
            f"arch: the tag {tag} of {arch} means timm's pretrained weights, {_NEVER_LOADED}; write "
            f"{name}"
        )


def _fixed_size(arch: str) -> int | None:
    """The only image size that the network takes as timm makes it, pixels; None: it takes any.

    Transformers have one, since each of their positions has an embedding."""
    found = timm.get_pretrained_cfg(arch)
    return found.input_size[-1] if found and found.fixed_input_size else None


def _timm(arch: str, kwargs: dict[str, Any], **ours: Any) -> nn.Module:
    return timm.create_model(arch, pretrained=False, num_classes=0, **ours | kwargs)


def _for_sizes(arch: str, kwargs: dict[str, Any], size: int) -> nn.Module:
    """A transformer with position embeddings for images of that size; it takes others, too."""
    try:
        return _timm(arch, kwargs, img_size=size, dynamic_img_size=True)
    except TypeError as e:
        if "dynamic_img_size" not in str(e):
            raise
        # XCiT has no such argument and needs none: it computes its embeddings from the positions.
        return _timm(arch, kwargs, img_size=size)


def _try_sizes(net: nn.Module, arch: str, sizes: tuple[int, ...]) -> None:
    """Runs the network once on each size.  Leaves it in eval mode."""
    for size in dict.fromkeys(sizes):
        try:
            with torch.no_grad():
                net.eval()(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as e:
            raise UserError(
                f"student.arch: {arch} cannot take crops of {size} px ({e}); set view.size, views "
                "and data.eval_size to what it can, or take another"
            ) from e


def _widened(times: int, kwargs: dict[str, Any]) -> nn.Module:
    """ResNet-50 with every width, the stem's too, multiplied by `times`."""
    width = 64 * times
    net = ResNet(
        # timm's annotation asks for an instance where its code takes the class.
        # pyrefly: ignore[bad-argument-type]
        Bottleneck,
        (3, 4, 6, 3),
        channels=tuple(width * 2**i for i in range(4)),
        num_classes=0,
        **kwargs,
    )
    # timm's stem has 64 channels at any width.  It is replaced, together with the two convolutions
    # that read it, and their weights are drawn as timm draws its own.
    first = cast(Bottleneck, net.get_submodule("layer1.0"))
    stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    net.conv1, net.bn1 = stem, nn.BatchNorm2d(width)
    first.conv1 = nn.Conv2d(width, width, 1, bias=False)
    shortcut = nn.Conv2d(width, 4 * width, 1, bias=False)
    cast(nn.Sequential, first.downsample)[0] = shortcut
    for conv in (stem, first.conv1, shortcut):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return net
