"""DeepSpeed's configuration, made from ours."""

from typing import Any

from fastdisco.common.errors import UserError
from fastdisco.common.precision import DTYPE
from fastdisco.config import Engine


def deepspeed_config(
    cfg: Engine, micro_batch: int, accumulate: int, clip: float, size: int, overlap: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration with cfg.deepspeed laid over it; `size` is the net's number of
    weights, `overlap` whether stages 1 and 2 exchange gradients while the backward runs.

    Raises UserError for a top-level key other than _RAW_KEYS (ours decides it, or DeepSpeed would
    ignore it silently), and for what would keep state where our checkpoints do not look."""
    parts = {
        "reduce_bucket_size": size,
        "reduce_scatter": False,
        "contiguous_gradients": False,
        "compute_grad_norm": clip > 0,
    }
    if overlap:  # buckets below the net's size, else the only one would go out at the end
        parts |= {
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": min(size, bucket_bytes(cfg) // 4),
        }
    zero = {"stage": cfg.stage} | {  # measured, see docs/engine.md
        0: {},
        1: parts,
        2: parts,
        3: {"reduce_bucket_size": size, "memory_efficient_linear": False},
    }[cfg.stage]
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,  # always written: left out, DeepSpeed clips at 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # optim.create tests it
        "timers": {"throughput": {"enabled": False}},  # its timer waits for the device every step
        "steps_per_print": None,
    }
    if cfg.precision != "fp32":  # weights, gradients and batch-norm statistics stay fp32
        # No module is "safe" for less: from stage 1 on DeepSpeed would reduce the gradients of
        # those in half precision, unlike at stage 0.
        dtype = str(DTYPE[cfg.precision]).removeprefix("torch.")
        ours["torch_autocast"] = {
            "enabled": True,
            "dtype": dtype,
            "lower_precision_safe_modules": [],
        }
    decided = [k for k in cfg.deepspeed if k in ours and k != "zero_optimization"]
    if decided:
        raise UserError(
            f"engine.deepspeed.{decided[0]}: is made from data.*, optim.clip and engine.*; set it "
            "there"
        )
    unknown = sorted(set(cfg.deepspeed) - _RAW_KEYS)
    if unknown:
        raise UserError(
            f"engine.deepspeed.{unknown[0]}: not a top-level key that can be passed to DeepSpeed, "
            f"which would ignore it silently; known: {', '.join(sorted(_RAW_KEYS))}"
        )
    raw = dict(cfg.deepspeed)
    over = raw.pop("zero_optimization", {})
    if cfg.stage == 0 and cfg.overlap and (theirs := sorted(set(raw) & _REDUCTION)):
        raise UserError(
            f"engine.deepspeed.{theirs[0]}: belongs to DeepSpeed's own exchange of gradients, which "
            "engine.overlap replaces at stage 0; set engine.overlap=false or remove it"
        )
    if elsewhere := sorted(set(over) & _ELSEWHERE):
        raise UserError(
            f"engine.deepspeed.zero_optimization.{elsewhere[0]}: keeps weights or optimizer state "
            "where the checkpoint does not look; remove it"
        )
    zero = zero | over
    if zero["stage"] != cfg.stage:
        raise UserError(
            f"engine.deepspeed.zero_optimization.stage: {zero['stage']} disagrees with "
            f"engine.stage {cfg.stage}; set engine.stage"
        )
    return ours | raw | {"zero_optimization": zero}


def bucket_bytes(cfg: Engine) -> int:
    return int(cfg.bucket_mb * 2**20)


# DeepSpeed ignores unknown top-level keys, so ours names the ones that make sense here.
_RAW_KEYS = {
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "compile",
}
_REDUCTION = {
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
}
_ELSEWHERE = {
    "offload_optimizer",
    "offload_param",
    "zenflow",
    "zero_hpz_partition_size",
    "round_robin_gradients",
}
