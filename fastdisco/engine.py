"""DeepSpeed around the student alone: its configuration made from ours, and what has to be settled before it is imported."""
import logging
import os
from typing import Any

import torch
from torch import nn

from fastdisco import dist
from fastdisco.config import Engine, UserError

DTYPE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def start(precision: str) -> torch.device:
    """Joins the ranks (NCCL on GPUs, gloo otherwise) and returns this rank's device.  Raises UserError where the precision cannot run."""
    dist.defaults()
    device = dist.device()
    if precision == "fp16" and device.type == "cpu":
        raise UserError("engine.precision: fp16 needs a GPU (it overflows every step on CPU); take fp32 or bf16")
    deepspeed = _deepspeed()
    # A compiled all-reduce that only inference uses: it would cost 40 s and a compiler at the first start, and a stale lock file hangs it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    return device


def create(net: nn.Module, optimizer: torch.optim.Optimizer, cfg: Engine, micro_batch: int, accumulate: int, clip: float):
    """The DeepSpeed engine: called like `net`, with `backward(loss)` and `step()` once each micro batch."""
    engine, *_ = _deepspeed().initialize(model=net, optimizer=optimizer, config=deepspeed_config(cfg, micro_batch, accumulate, clip))
    return engine


def deepspeed_config(cfg: Engine, micro_batch: int, accumulate: int, clip: float) -> dict[str, Any]:
    """DeepSpeed's configuration with cfg.deepspeed laid over it.

    Raises UserError for a top-level key that DeepSpeed does not know (it would ignore it silently) or that ours decides."""
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,  # always written: left out, DeepSpeed clips at 1.0
        "zero_optimization": {"stage": cfg.stage},
        "timers": {"throughput": {"enabled": False}},  # its timer waits for the device every step
        "steps_per_print": None,
    }
    if cfg.precision != "fp32":  # weights, gradients and batch-norm statistics stay fp32
        ours["torch_autocast"] = {"enabled": True, "dtype": str(DTYPE[cfg.precision]).removeprefix("torch.")}
    decided = [k for k in cfg.deepspeed if k in ours and k != "zero_optimization"]
    if decided:
        raise UserError(f"engine.deepspeed.{decided[0]}: is made from data.*, optim.clip and engine.*; set it there")
    unknown = sorted(set(cfg.deepspeed) - _RAW_KEYS)
    if unknown:
        raise UserError(f"engine.deepspeed.{unknown[0]}: not a top-level key that can be passed to DeepSpeed, which would ignore it "
                        f"silently; known: {', '.join(sorted(_RAW_KEYS))}")
    raw = dict(cfg.deepspeed)
    zero = ours["zero_optimization"] | raw.pop("zero_optimization", {})
    if zero["stage"] != cfg.stage:
        raise UserError(f"engine.deepspeed.zero_optimization.stage: {zero['stage']} disagrees with engine.stage {cfg.stage}; set engine.stage")
    return ours | raw | {"zero_optimization": zero}


def autocast(precision: str, device: torch.device):
    """The precision of the forward passes that do not go through the engine: mean student, teacher, evaluation."""
    return torch.autocast(device.type, dtype=DTYPE[precision] or torch.bfloat16, enabled=precision != "fp32")


def scaler(engine) -> torch.amp.GradScaler | None:
    """The loss scaler of fp16 at ZeRO stage 0, else None."""
    return engine.torch_autocast_z0_gradscaler


def stop():
    """Leaves the process group, so that the process ends without complaint."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# DeepSpeed ignores unknown top-level keys, so ours names the ones that make sense here.
_RAW_KEYS = {"zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "comms_logger", "flops_profiler",
             "wall_clock_breakdown", "memory_breakdown", "dump_state", "compile", "zero_allow_untested_optimizer"}


def _deepspeed():
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it says on every rank that it found no GPU
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    import deepspeed
    return deepspeed
