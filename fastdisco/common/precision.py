"""Precisions, by the names that the configuration has for them."""

import torch

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device, cache: bool = True) -> torch.autocast:
    """A context for forward passes that do not go through the engine: those of the mean student
    (EMA) and of evaluations.

    precision  a key of DTYPE; fp32 leaves everything as it is
    cache      keep each weight's cast copy until the context ends.  False in a CUDA graph, which
               must cast the weights again in each replay"""
    return torch.autocast(
        device.type, dtype=DTYPE[precision], enabled=precision != "fp32", cache_enabled=cache
    )
