"""DeepSpeed around the student alone: the process group, and the engine made from our
configuration."""

import logging
import os
from functools import partial

import torch
from torch import nn

from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.config import Engine
from fastdisco.engine.exchange import Exchange
from fastdisco.engine.settings import bucket_bytes, deepspeed_config


def start(cfg: Engine) -> torch.device:
    """Joins the ranks (NCCL on GPUs, gloo otherwise), sets how float32 is computed, and returns
    this rank's device.

    Raises UserError where the precision cannot run."""
    dist.defaults()
    device = dist.device()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cfg.tf32, False
    if cfg.precision == "fp16" and device.type == "cpu":
        raise UserError(
            "engine.precision: fp16 needs a GPU (it overflows every step on CPU); take fp32 or bf16"
        )
    deepspeed = import_deepspeed()
    # A compiled all-reduce that only inference uses: it would cost 40 s and a compiler at the first
    # start, and a stale lock file hangs it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    return device


def stop():
    """Leaves the process group, so that the process ends without complaint."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def create(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    cfg: Engine,
    micro_batch: int,
    accumulate: int,
    clip: float,
):
    """The DeepSpeed engine: called like `net`, with `backward(loss)` and `step()` once each micro
    batch.

    At stage 0 the net's weights become channels_last, and its gradients are exchanged while the
    backward runs.
    From stage 1 on the optimizer no longer holds the net's parameters, at stage 3 neither does the
    net: see `gathered`.
    Raises UserError for an optimizer or a net that DeepSpeed cannot take; optim.create and the
    config have refused the others."""
    if cfg.stage and isinstance(optimizer, torch.optim.Adagrad):
        raise UserError(
            f"optim.name: at ZeRO stage {cfg.stage} DeepSpeed makes a new Adagrad, without our "
            "weight decay and learning rates; set engine.stage=0 or take another optimizer"
        )
    if bare := [name for name, p in net.named_parameters() if not p.dim()]:
        raise UserError(
            "student.arch: DeepSpeed cannot send a weight without dimension to the other ranks, "
            f"as {bare[0]} is; take another"
        )
    # Alone it would only wait for the device in every backward.
    overlap = cfg.overlap and dist.device().type == "cuda" and dist.world() > 1
    settings = deepspeed_config(
        cfg, micro_batch, accumulate, clip, sum(p.numel() for p in net.parameters()), overlap
    )
    deepspeed = import_deepspeed()
    # optim.create has tested it.
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "untested optimizer" not in record.getMessage()
    )
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    # The same norm and factor; DeepSpeed's form takes a kernel or two for each weight, and waits
    # for the device.
    if clip and not cfg.stage:
        engine.clip_fp32_gradients = partial(nn.utils.clip_grad_norm_, list(net.parameters()), clip)
    # Else the weights are slices of one flat tensor, contiguous each; channels_last views suffice
    # for activations.
    if cfg.stage == 0:
        # Not before: DeepSpeed broadcasts the weights as bytes, which needs them contiguous.
        net.to(memory_format=torch.channels_last)
        if cfg.overlap:
            # What DeepSpeed calls at the end of each backward, where its own would reduce all
            # gradients at once.
            engine.allreduce_gradients = Exchange(
                net, bucket_bytes(cfg), engine.is_gradient_accumulation_boundary
            ).finish
    return engine


def scaler(engine) -> torch.amp.GradScaler | None:
    """The loss scaler of fp16 at ZeRO stage 0, else None."""
    return engine.torch_autocast_z0_gradscaler


def import_deepspeed():
    if not torch.cuda.is_available():
        # Else it says on every rank that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # "No CUDA runtime is found".
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed

    return deepspeed
