"""Networks: a timm backbone with a projection head and prototypes, its batch norms, its mean
student (EMA), its weights.

Level 1: imports config, common and kernels.  Only this package makes timm's models."""

from fastdisco.common.precision import DTYPE
from fastdisco.models.backbones import WIDE, shapes
from fastdisco.models.batchnorm import mean_buffers, split_bn, sync_bn
from fastdisco.models.build import create, of
from fastdisco.models.ema import ema_copy, ema_update
from fastdisco.models.net import Net, Out, size
from fastdisco.models.weights import from_run, last, load_weights, read

__all__ = [
    "DTYPE",
    "WIDE",
    "Net",
    "Out",
    "create",
    "ema_copy",
    "ema_update",
    "from_run",
    "last",
    "load_weights",
    "mean_buffers",
    "of",
    "read",
    "shapes",
    "size",
    "split_bn",
    "sync_bn",
]
