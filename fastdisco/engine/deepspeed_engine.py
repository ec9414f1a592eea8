"""DeepSpeed around the student alone: the process group, and the engine made from our
configuration."""

import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as td
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

# How long ranks wait for each other to join; and, at least, in an exchange.
JOIN, _EXCHANGE = timedelta(minutes=5), timedelta(minutes=10)
# Seconds that rank 0 waits for MASTER_PORT: of a training that was just killed it may still be closing.
_PORT = 5.0
# Newer torch has a public name for it.
_set_timeout = getattr(td, "set_timeout", None) or td.distributed_c10d._set_pg_timeout


def start(cfg: Engine, patience: float | None = None) -> torch.device:
    """Joins the ranks (NCCL on GPUs, gloo otherwise), sets how float32 is computed, and returns
    this rank's device.

    patience  seconds after which the caller itself ends what hangs; an exchange then fails after a
              minute more only
    Raises UserError where the machine's GPU cannot be used, the precision cannot run, or another
    program has MASTER_PORT."""
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
    backend = "nccl" if device.type == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        _join_again(backend, device)
    _on_free_port(lambda: deepspeed.init_distributed(dist_backend=backend, timeout=JOIN))
    # Longer than in start-up: a rank may save or evaluate while others wait.
    limit = timedelta(seconds=patience + 60) if patience else _EXCHANGE
    _set_timeout(max(limit, _EXCHANGE))
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


def _on_free_port(join: Callable[[], Any]) -> None:
    """Joins the ranks.  Raises UserError where another program keeps rank 0 from MASTER_PORT."""
    end = time.monotonic() + _PORT
    while True:
        try:
            join()
            return
        except td.DistNetworkError as e:
            if "EADDRINUSE" not in str(e):
                raise
            if time.monotonic() > end:
                raise UserError(
                    f"MASTER_PORT={os.environ.get('MASTER_PORT')}: another program listens on this "
                    "port; end it, or give another port"
                ) from None
        time.sleep(0.2)


def _join_again(backend: str, device: torch.device) -> None:
    """Joins the ranks after `torchrun --max_restarts` has started them anew; DeepSpeed takes the
    group as it is.

    torchrun's store still has the addresses of the ranks that died.  Under their names a rank would
    find a dead one before the new one has come."""
    store, rank, world = next(td.rendezvous("env://", timeout=JOIN))
    store = td.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # As DeepSpeed does.
    own: dict[str, Any] = {"device_id": device} if device.type == "cuda" and world > 1 else {}
    td.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=JOIN, **own)


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
