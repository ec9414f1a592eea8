"""Networks.

backbones.py   timm's models, and SwAV's widened ResNets
heads.py       projection heads and prototypes
net.py         Net: backbone, head and prototypes together
build.py       the Net of a configuration
batchnorm.py   batch norm over part of a batch, or over all ranks
ema.py         the mean student (EMA)
queue.py       MoCo's queue of negatives
weights.py     weights from files, strictly;  pickles.py  what else a file may hold
runs.py        the networks of finished runs, and their checkpoints;  manifest.py  those's files

Level 1: imports config, common and kernels.  No other package makes timm's models."""

from fastdisco.common.precision import DTYPE
from fastdisco.models.backbones import WIDE, backbone, shapes
from fastdisco.models.batchnorm import has_batch_norms, mean_buffers, split_bn, sync_bn
from fastdisco.models.build import create, of
from fastdisco.models.ema import ema_copy, ema_update, perturbed
from fastdisco.models.net import Net, Out, macs, size
from fastdisco.models.runs import checkpoints, from_run, last, newest_first
from fastdisco.models.weights import load_weights, read

__all__ = [
    "DTYPE",
    "WIDE",
    "Net",
    "Out",
    "backbone",
    "checkpoints",
    "create",
    "ema_copy",
    "ema_update",
    "from_run",
    "has_batch_norms",
    "last",
    "load_weights",
    "macs",
    "mean_buffers",
    "newest_first",
    "of",
    "perturbed",
    "read",
    "shapes",
    "size",
    "split_bn",
    "sync_bn",
]
