"""DeepSpeed around the student alone: the process group, and the engine made from our
configuration."""

import logging
import os
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastdisco.common import dist, launch
from fastdisco.common.errors import UserError
from fastdisco.config import Engine
from fastdisco.engine import unit_rows
from fastdisco.engine.device import choose
from fastdisco.engine.exchange import Exchange
from fastdisco.engine.settings import bucket_bytes, deepspeed_config

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def start(cfg: Engine) -> torch.device:
    """Joins the ranks (NCCL on GPUs, gloo otherwise), sets how float32 is computed, and returns
    this rank's device.

    Raises UserError where the machine's GPU cannot be used, or the precision cannot run."""
    dist.defaults()
    launch.follow()
    # First DeepSpeed: its import changes how torch looks for a GPU, and the device is chosen once.
    deepspeed = import_deepspeed()
    device = choose()
    torch.backends.cudnn.allow_tf32 = cfg.tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    if cfg.precision == "fp16" and device.type == "cpu":
        raise UserError(
            "engine.precision: fp16 needs a GPU (it overflows every step on CPU); take fp32 or bf16"
        )
    if device.type == "cpu":
        # This all-reduce of CPUs is used in inference only.  To compile it would take 40 s and a
        # compiler at the first start, and a lock file left behind by a killed start hangs it.  On a
        # GPU nobody asks for it, while this look at the list would print seven warnings.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leaves the process group, so that torch prints no warning when the process ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def create(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    cfg: Engine,
    micro_batch: int,
    accumulate: int,
    clip: float,
) -> "DeepSpeedEngine":
    """The DeepSpeed engine of a network: it is called like `net`, and its `backward(loss)` and
    `step()` are called once per micro batch.

    micro_batch  images per rank and forward
    accumulate   micro batches per optimizer step
    clip         norm at which the gradients are clipped; 0: not at all
    At stage 0 the network's weights become channels_last.  From stage 1 on the optimizer holds
    other tensors than the network's parameters, and at stage 3 the network itself holds parts of
    them only: see `gathered`.
    Raises UserError for an optimizer or a network that DeepSpeed cannot take; others are refused
    before, by optim.create and by the configuration."""
    _refuse(net, optimizer, cfg)
    # DeepSpeed's overlap needs several GPUs.  With one rank it would only wait for the device in
    # each backward.
    overlap = cfg.overlap and dist.device().type == "cuda" and dist.world() > 1
    size = sum(p.numel() for p in net.parameters())
    settings = deepspeed_config(cfg, micro_batch, accumulate, clip, size, overlap)
    deepspeed = import_deepspeed()
    # DeepSpeed's warning about an optimizer that it does not know: optim.create has tested it.
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "untested optimizer" not in record.getMessage()
    )
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    if cfg.stage == 0:
        _prepare_stage_0(engine, net, cfg, clip)
    else:
        unit_rows.keep_flat(engine)
    return engine


def scaler(engine: "DeepSpeedEngine") -> torch.amp.GradScaler | None:
    """The loss scaler of fp16, which only ZeRO stage 0 has; otherwise None."""
    return engine.torch_autocast_z0_gradscaler


def import_deepspeed() -> ModuleType:
    """The module deepspeed, imported when it is first needed, without its complaints where there is
    no GPU."""
    if not torch.cuda.is_available():
        # Without it, every rank prints that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # It warns "No CUDA runtime is found".
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed

    return deepspeed


def _refuse(net: nn.Module, optimizer: torch.optim.Optimizer, cfg: Engine) -> None:
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


def _prepare_stage_0(engine: "DeepSpeedEngine", net: nn.Module, cfg: Engine, clip: float) -> None:
    """What DeepSpeed does at stage 0 and we do better."""
    if clip:
        # The same norm and factor.  DeepSpeed's form takes a kernel or two for each weight, and
        # waits for the device.
        engine.clip_fp32_gradients = partial(nn.utils.clip_grad_norm_, list(net.parameters()), clip)
    # Not before DeepSpeed has broadcast the weights: it does so as bytes, which needs them
    # contiguous.  And not from stage 1 on, where the weights are slices of one flat tensor, each
    # contiguous; there channels_last views suffice for the activations.
    net.to(memory_format=torch.channels_last)
    if cfg.overlap:
        # DeepSpeed calls this at the end of each backward.  Its own would only now reduce all
        # gradients, at once.
        engine.allreduce_gradients = Exchange(
            net, bucket_bytes(cfg), engine.is_gradient_accumulation_boundary
        ).finish
