"""Precisions by the names of a configuration."""

import torch

# By the names of a configuration.
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device, cache: bool = True):
    """The precision of the forward passes that do not go through the engine: mean student,
    evaluation.

    cache  keep weights that were cast until the context ends; not in a CUDA graph, which must cast
           them anew in each replay"""
    return torch.autocast(
        device.type, dtype=DTYPE[precision], enabled=precision != "fp32", cache_enabled=cache
    )
