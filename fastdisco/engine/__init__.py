"""What runs a network: DeepSpeed, the exchange of gradients, the optimizer, CUDA graphs,
compilation.

Level 1: imports config and common.  Only this package imports deepspeed and timm.optim."""

from fastdisco.common.precision import autocast
from fastdisco.engine.deepspeed_engine import create, scaler, start, stop
from fastdisco.engine.settings import deepspeed_config
from fastdisco.engine.zero import (
    gathered,
    load_optimizer_state,
    load_weights,
    optimizer_state,
    weights,
)

__all__ = [
    "autocast",
    "create",
    "deepspeed_config",
    "gathered",
    "load_optimizer_state",
    "load_weights",
    "optimizer_state",
    "scaler",
    "start",
    "stop",
    "weights",
]
