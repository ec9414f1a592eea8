"""What plain timm needs to make one of our backbones, and what it makes of an exported folder."""

from pathlib import Path
from typing import Any

import timm
from torch import nn

from fastdisco.common.errors import UserError
from fastdisco.models.backbones import WIDE, shapes


def arguments(arch: str, kwargs: dict[str, Any], backbone: nn.Module) -> dict[str, Any]:
    """The arguments of timm.create_model, beside num_classes=0, that make this backbone.

    A transformer that was made for other images than the architecture's needs their size, too.
    Raises UserError where timm has no such architecture."""
    if arch in WIDE:
        raise UserError(
            f"{arch}: is SwAV's widened ResNet, which timm does not have; leave timm out of --to"
        )
    own = {name: tuple(x.shape) for name, x in backbone.state_dict().items()}
    embed: Any = getattr(backbone, "patch_embed", None)
    if embed is None or kwargs or own == shapes(arch):
        return dict(kwargs)
    dynamic = {"dynamic_img_size": True} if getattr(backbone, "dynamic_img_size", False) else {}
    return {"img_size": int(embed.img_size[0])} | dynamic


def from_folder(folder: Path) -> nn.Module:
    """The network of a folder with config.json and model.safetensors, in eval mode, by timm alone."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def resolved(arch: str) -> dict[str, Any]:
    """What timm's own description of an architecture says about its first and last layer, which a
    folder's description must repeat: timm takes it from nowhere else."""
    found = timm.get_pretrained_cfg(arch)
    if found is None:
        return {}
    own = {"first_conv": found.first_conv, "classifier": found.classifier}
    return {k: v for k, v in own.items() if v is not None}
