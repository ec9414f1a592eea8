"""Which architecture a teacher's weights belong to, by their names and shapes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdisco import models

# Numbers of attention heads leave no trace in names and shapes: a file with others than these have
# needs teacher.arch.
ARCHS = (
    "resnet50",
    "resnet18",
    "resnet34",
    "resnet101",
    "resnet152",
    *models.WIDE,
    "vit_small_patch16_224",
    "vit_tiny_patch16_224",
    "vit_base_patch16_224",
    "vit_small_patch8_224",
    "vit_base_patch8_224",
    "xcit_small_12_p16_224",
    "xcit_tiny_12_p16_224",
    "xcit_small_12_p8_224",
    "xcit_medium_24_p16_224",
    "xcit_medium_24_p8_224",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "efficientnet_b1",
)

# DINO's full checkpoint, for backbones that may be from one of its files without head.
FULL_CHECKPOINTS = {
    arch: f"dino_{name}_pretrain_full_checkpoint.pth"
    for arch, name in (
        ("vit_small_patch16_224", "deitsmall16"),
        ("vit_small_patch8_224", "deitsmall8"),
        ("vit_base_patch16_224", "vitbase16"),
        ("vit_base_patch8_224", "vitbase8"),
        ("xcit_small_12_p16_224", "xcit_small_12_p16"),
        ("xcit_small_12_p8_224", "xcit_small_12_p8"),
        ("xcit_medium_24_p16_224", "xcit_medium_24_p16"),
        ("xcit_medium_24_p8_224", "xcit_medium_24_p8"),
    )
}


def recognise(weights: Mapping[str, Any], archs: tuple[str, ...] = ARCHS) -> tuple[str, float]:
    """The architecture nearest to the names and shapes of backbone.*, and which share of all names
    agrees; 1: every one."""
    own = {
        k.removeprefix("backbone."): tuple(x.shape) if isinstance(x, Tensor) else None
        for k, x in weights.items()
        if not k.startswith("head.") and _counted(k)
    }
    best = ("none", 0.0)
    for arch in archs:
        theirs = {k: s for k, s in models.shapes(arch).items() if _counted(k)}
        share = sum(own.get(k) == s for k, s in theirs.items()) / len(own | theirs)
        best = max(best, (arch, share), key=lambda b: b[1])
        if share == 1:
            break
    return best


def _counted(name: str) -> bool:
    # Old files lack the counters.
    return not name.endswith(".num_batches_tracked")
