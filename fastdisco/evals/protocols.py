"""The published protocols of linear evaluation and fine-tuning, as data, and the learning rate of
each epoch."""

import difflib
import math
from typing import Literal

from pydantic import Field, model_validator

from fastdisco.common.errors import UserError
from fastdisco.config import Crop
from fastdisco.config.block import Block

IMAGENET_STD = (0.229, 0.224, 0.225)
# SwAV's scripts write 0.228 for red, in training and evaluation alike.
SWAV_STD = (0.228, 0.224, 0.225)


class Protocol(Block):
    """How a classifier on frozen features is trained and measured.

    The optimizer is SGD; weights start at N(0, 0.01), biases at 0.  The backbone is in eval mode
    throughout, unless `trunk_lr` says that it is trained too."""

    epochs: int = Field(100, ge=1)
    batch: int = Field(256, ge=1)  # images per step, over all ranks
    lr: float = Field(3.0, gt=0)
    # lr times batch / 256, or lr itself.
    lr_scale: Literal["none", "linear"] = "none"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[int, ...] = ()  # epochs at which `step` multiplies by `factor`
    factor: float = Field(0.1, gt=0, le=1)
    # Linear from lr to lr x batch / 256, epoch by epoch: SEED's.
    warmup_epochs: int = Field(0, ge=0)
    # Of the backbone, which is then trained in train mode; null: it is frozen.
    trunk_lr: float | None = Field(None, gt=0)
    # Weights of the new layer: N(0, 0.01) with bias 0, or as torch draws a linear layer.
    init: Literal["normal", "torch"] = "normal"
    size: int = Field(224, ge=8)  # side of the crops
    resize: int = Field(256, ge=8)  # short side before the centre crop
    scale: tuple[float, float] = (0.08, 1.0)  # share of the area of a random crop
    train_interpolation: Literal["linear", "cubic"] = "linear"
    val_interpolation: Literal["linear", "cubic"] = "linear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = IMAGENET_STD
    # Of a ViT, the class tokens of its last blocks, concatenated; 1: the backbone's output.
    blocks: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "Protocol":
        if self.size > self.resize:
            raise ValueError(
                f"size: a centre crop of {self.size} does not fit into a short side of "
                f"{self.resize} (resize)"
            )
        if self.warmup_epochs and self.lr_scale != "linear":
            raise ValueError("warmup_epochs: warms up to lr x batch / 256; set lr_scale=linear")
        return self


_DISCO = Protocol(milestones=(5, 10, 15, 20, 25, 30, 35, 40, 45, 60, 80), factor=0.5)
_TUNE = Protocol(
    epochs=20,
    lr=0.2,
    trunk_lr=0.01,
    milestones=(12, 16),
    factor=0.2,
    std=SWAV_STD,
    init="torch",
)

PRESETS: dict[str, Protocol] = {
    # DisCo's main_lincls.py with the lr of its README.
    "disco": _DISCO,
    # MoCo's main_lincls.py.
    "moco": Protocol(lr=30.0, milestones=(60, 80)),
    # SwAV's eval_linear.py.
    "swav": Protocol(lr=0.3, weight_decay=1e-6, schedule="cosine", std=SWAV_STD),
    # DINO's eval_linear.py: 8 x 128 images, lr 0.001 x 1024 / 256; `blocks` is for its ViTs.
    "dino": Protocol(
        batch=1024, lr=0.001, lr_scale="linear", schedule="cosine", val_interpolation="cubic"
    ),
    # SEED's main_lincls.py.
    "seed": Protocol(lr=30.0, lr_scale="linear", milestones=(60, 80), factor=0.1, warmup_epochs=5),
    # DisCo's main_lincls_semi.py: linear on 1 % or 10 % of the labels, no fine-tuning.
    "semi": Protocol(milestones=(60, 80), factor=0.5),
    # SwAV's eval_semisup.py: fine-tuning of the whole network on 1 % and 10 %.
    "finetune-1": _TUNE.model_copy(update={"lr": 5.0, "trunk_lr": 0.02}),
    "finetune-10": _TUNE,
    # DisCo's cifar_main_lincls.py.
    "cifar": Protocol(
        epochs=200,
        schedule="constant",
        resize=224,
        train_interpolation="cubic",
        val_interpolation="cubic",
    ),
}


def preset(name: str) -> Protocol:
    """Raises UserError for a name that is none, with the nearest."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PRESETS)}"
        raise UserError(f"preset: no protocol is called {name!r}; {hint}")
    return PRESETS[name]


def rate(p: Protocol, epoch: int, lr: float | None = None) -> float:
    """Learning rate of an epoch, counted from 0.  lr: in place of the protocol's own, on the same
    schedule."""
    base = p.lr if lr is None else lr
    top = base * p.batch / 256 if p.lr_scale == "linear" else base
    if epoch < p.warmup_epochs:
        return base + (top - base) * epoch / p.warmup_epochs
    if p.schedule == "cosine":
        return top * 0.5 * (1 + math.cos(math.pi * epoch / p.epochs))
    if p.schedule == "step":
        return top * p.factor ** sum(epoch >= m for m in p.milestones)
    return top


def trunk_rate(p: Protocol, epoch: int) -> float:
    """Learning rate of the backbone where it is trained, on the schedule of the head."""
    assert p.trunk_lr is not None
    return p.trunk_lr * rate(p, epoch) / p.lr


def crop(p: Protocol) -> Crop:
    """The random view of training: crop and flip, nothing else."""
    return Crop(
        size=p.size,
        scale=p.scale,
        jitter_p=0,
        gray_p=0,
        blur_p=0,
        interpolation=p.train_interpolation,
        mean=p.mean,
        std=p.std,
    )
