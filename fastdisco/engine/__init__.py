"""What runs and trains a network.

deepspeed_engine.py  DeepSpeed around the student: start, engine, stop
settings.py          DeepSpeed's configuration, made from ours
zero.py              weights and optimizer state under the parameters' names, at any ZeRO stage
exchange.py          gradients averaged over ranks while the backward runs
unit_rows.py         weights whose rows keep length 1
optim.py             parameter groups, optimizers, schedules
cudagraph.py         a forward as a CUDA graph on a stream of its own
compiled.py          torch.compile of a backbone

Level 1: imports config and common.  No other package imports deepspeed or timm.optim."""

from fastdisco.common.precision import autocast
from fastdisco.engine.deepspeed_engine import create, scaler, start, stop
from fastdisco.engine.device import describe, memory
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
    "describe",
    "gathered",
    "load_optimizer_state",
    "load_weights",
    "memory",
    "optimizer_state",
    "scaler",
    "start",
    "stop",
    "weights",
]
