"""Weights under the names that others load: timm and the Hugging Face hub, torchvision, detectron2."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdisco.common.errors import UserError
from fastdisco.evals.passes import View
from fastdisco.models import plain_timm
from fastdisco.models.weights import as_safetensors, plain

# timm's names of the ResNets that torchvision has, too, with the same names of weights.
RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
# Of the largest feature: how far a network that is made of the files may be from ours.
NEAR = 1e-5
_INTERPOLATIONS = {"linear": "bilinear", "cubic": "bicubic"}


class Subject(NamedTuple):
    """What is exported."""

    backbone: nn.Module  # on the CPU, in eval mode, float32
    head: nn.Module | None
    arch: str
    kwargs: dict[str, Any]
    features: int
    view: View
    licence: str  # as the Hugging Face hub writes it


def timm(subject: Subject, folder: Path) -> list[str]:
    """model.safetensors and config.json for timm.create_model("local-dir:FOLDER", pretrained=True),
    and the head apart in head.safetensors.  Returns their names.

    Raises UserError where timm cannot make the network, or makes another of the files."""
    s = subject
    arguments = plain_timm.arguments(s.arch, s.kwargs, s.backbone)
    view = {
        "input_size": [3, s.view.size, s.view.size],
        "fixed_input_size": False,
        "interpolation": _INTERPOLATIONS[s.view.interpolation],
        "crop_pct": s.view.size / s.view.resize,
        "crop_mode": "center",
        "mean": list(s.view.mean),
        "std": list(s.view.std),
    }
    config = {
        "architecture": s.arch,
        "num_classes": 0,
        "num_features": s.features,
        "pretrained_cfg": {"num_classes": 0, "license": s.licence}
        | view
        | plain_timm.resolved(s.arch),
    }
    if pool := getattr(s.backbone, "global_pool", None):
        # Convolutional networks have a module here, transformers a name.
        config["global_pool"] = pool if isinstance(pool, str) else getattr(pool, "pool_type", "avg")
    if arguments:
        config["model_args"] = arguments
    # Written whole: safetensors' own save_file makes files that only their owner can read.
    (folder / "model.safetensors").write_bytes(as_safetensors(s.backbone.state_dict()))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    _same(s, plain_timm.from_folder(folder), "timm")
    names = ["model.safetensors", "config.json"]
    if s.head is not None and s.head.state_dict():
        (folder / "head.safetensors").write_bytes(as_safetensors(s.head.state_dict()))
        names.append("head.safetensors")
    return names


def torchvision(subject: Subject, folder: Path) -> list[str]:
    """torchvision.pth, for torchvision.models.<arch>().load_state_dict(..., strict=False): the
    classifier alone is missing.  Raises UserError for what is no ResNet of torchvision's."""
    import torchvision

    _resnet(subject, "torchvision")
    weights = plain(subject.backbone.state_dict())
    theirs = getattr(torchvision.models, subject.arch)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(weights)
    _same(subject, theirs.eval(), "torchvision")
    torch.save(weights, folder / "torchvision.pth")
    return ["torchvision.pth"]


def detectron2(subject: Subject, folder: Path) -> list[str]:
    """detectron2.pth, {"model": weights under the names of detectron2's ResNet}, for MODEL.WEIGHTS.
    Its checkpointer finds the network's part by the ends of names (matching_heuristics).

    Raises UserError for what is no ResNet of torchvision's."""
    _resnet(subject, "detectron2")
    weights = {as_detectron2(k): x for k, x in plain(subject.backbone.state_dict()).items()}
    kept = {k: x for k, x in weights.items() if not k.endswith("num_batches_tracked")}
    torch.save({"model": kept, "matching_heuristics": True}, folder / "detectron2.pth")
    return ["detectron2.pth"]


WRITERS: dict[str, Callable[[Subject, Path], list[str]]] = {
    "timm": timm,
    "torchvision": torchvision,
    "detectron2": detectron2,
}


def refuse(name: str, subject: Subject) -> None:
    """Raises UserError where the format cannot hold such a network; nothing is written or computed."""
    if name == "timm":
        plain_timm.arguments(subject.arch, subject.kwargs, subject.backbone)
    else:
        _resnet(subject, name)


def as_detectron2(name: str) -> str:
    """torchvision's name of a ResNet's weight -> detectron2's: layer1.0.bn2.weight ->
    res2.0.conv2.norm.weight."""
    name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)


def _resnet(subject: Subject, whose: str) -> None:
    if subject.arch not in RESNETS or subject.kwargs:
        made = f" with {subject.kwargs}" if subject.kwargs else ""
        raise UserError(
            f"--to {whose}: has names for ResNets alone ({', '.join(RESNETS[:4])} ...), and this is "
            f"{subject.arch}{made}; leave {whose} out"
        )


@torch.no_grad()
def _same(subject: Subject, theirs: nn.Module, whose: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, subject.view.size, subject.view.size, generator=draw)
    want, got = subject.backbone(x), theirs(x)
    off = ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()
    # So written that nan fails, too.
    if not off <= NEAR:
        raise UserError(
            f"--to {whose}: the {subject.arch} that {whose} makes of the files differs by {off:.2g} "
            f"of the largest feature, more than {NEAR:g}; leave {whose} out"
        )
