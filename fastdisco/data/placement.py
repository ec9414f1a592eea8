"""Where an image is decoded and augmented, and in which form the network gets it: `data.decode`,
`data.augment` and what goes with them."""

from typing import NamedTuple

import torch

from fastdisco import config
from fastdisco.common.errors import UserError


class Placement(NamedTuple):
    """The device of each step, `cpu` or `gpu`.  Nothing returns from the GPU to the CPU.

    All placements give the same views, up to rounding and the decoder's last bit."""

    decode: str
    augment: str
    out: str  # where the network is; the last step, normalising, runs there
    half: bool  # views in float16, on a GPU
    hw_load: float  # share of the JPEGs for the GPU's decoding engine, where it has one
    prefetch: int  # batches made ahead
    copy: bool = False  # views are copied into torch's memory


def place(images: config.Data, device: torch.device, precision: str = "fp32") -> Placement:
    """The placement that the configuration asks for on this device.

    precision  of the network's forward passes.  bf16 gets float16 views, too: float16 holds
               normalised pixels more exactly, and DALI has no bf16.
    Raises UserError where a GPU is asked for and there is none."""
    out = kind(device)
    for key in ("decode", "augment"):
        if getattr(images, key) == "gpu" and out == "cpu":
            raise UserError(
                f"data.{key}: gpu needs an NVIDIA GPU, there is none here; take auto or cpu"
            )
    augment = out if images.augment == "auto" else images.augment
    decode = augment if images.decode == "auto" else images.decode
    half = out == "gpu" and precision != "fp32"
    load, ahead = images.hw_decoder_load, images.prefetch
    return Placement(decode, augment, out, half, load, ahead, images.copy_views)


def default_placement(device: torch.device) -> Placement:
    """The placement of the configuration's defaults on this device."""
    return place(config.Data.model_construct(), device)


def kind(device: torch.device) -> str:
    """DALI's word for the device, `cpu` or `gpu`."""
    return "gpu" if torch.device(device).type == "cuda" else "cpu"
