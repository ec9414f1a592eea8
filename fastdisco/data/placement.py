"""Where an image is decoded and augmented, and in which form the network gets it: `data.decode`,
`data.augment` and what goes with them."""

from typing import NamedTuple

import torch

from fastdisco import config
from fastdisco.common.errors import UserError


class Placement(NamedTuple):
    """Devices are cpu or gpu; nothing goes back from the GPU.  All ways give the same views, up to
    rounding and the decoder's last bit."""

    decode: str
    augment: str
    out: str  # where the network is; normalising, the last step, is done there
    half: bool  # views in float16, on a GPU
    hw_load: float  # share of the JPEGs that the decoding engine takes where the GPU has one
    prefetch: int  # batches made ahead


def place(images: config.Data, device: torch.device, precision: str = "fp32") -> Placement:
    """The way that the configuration asks for on this device.  precision: of the network's forward
    passes; bf16 gets float16 too, which holds normalised pixels more exactly, and DALI has no bf16.

    Raises UserError where a GPU is asked for and there is none."""
    out = kind(device)
    for key in ("decode", "augment"):
        if getattr(images, key) == "gpu" and out == "cpu":
            raise UserError(
                f"data.{key}: gpu needs an NVIDIA GPU, there is none here; take auto or cpu"
            )
    augment = out if images.augment == "auto" else images.augment
    decode = augment if images.decode == "auto" else images.decode
    return Placement(
        decode,
        augment,
        out,
        out == "gpu" and precision != "fp32",
        images.hw_decoder_load,
        images.prefetch,
    )


def default_placement(device: torch.device) -> Placement:
    """With the defaults of the configuration."""
    return place(config.Data.model_construct(), device)


def kind(device: torch.device) -> str:
    return "gpu" if torch.device(device).type == "cuda" else "cpu"
