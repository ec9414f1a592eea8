"""What the forkserver of `ranks` imports before it forks, so that each rank starts with everything a
training imports, and with DALI's conversion of the training graph, which takes a second."""

import contextlib
import importlib

import deepspeed.ops
import deepspeed.runtime.zero.muon.original_muon
import numpy.ma  # noqa: F401
import pytest  # noqa: F401
import torch
import torch.utils.serialization
import torch.utils.tensorboard

import fastdisco.train  # noqa: F401
from fastdisco.config import Crop
from fastdisco.data import decoder, placement
from fastdisco.methods import dino, moco, seed, swav  # noqa: F401

# What DeepSpeed imports, and asks the compiler, when its engine starts; releases differ.
getattr(deepspeed.ops, "__compatible_ops__", None)
for name in ("comm.mori", "module_inject.auto_ep_layer", "moe.ep_count"):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"deepspeed.{name}")


def convert_the_graph() -> None:
    """DALI rewrites each function of a graph with conditions at its first use, and keeps the
    result.  Nothing is built here, so no thread is started and the process can be forked."""
    every_step = Crop(jitter_p=0.5, gray_p=0.5, blur_p=0.5, solarize_p=0.5, flip_p=0.5)
    decoder.graphs().train(
        (every_step,),
        {"files": ["x.jpg"], "file_root": "/"},
        lambda batch: (),
        placement.default_placement(torch.device("cpu")),
        batch_size=1,
        num_threads=1,
        device_id=None,
    )


convert_the_graph()
