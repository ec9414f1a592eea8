"""DeepSpeed's configuration, made from ours.  docs/engine.md has the reason of each setting."""

from typing import Any

from fastdisco.common.errors import UserError
from fastdisco.common.precision import DTYPE
from fastdisco.config import Engine

# The top-level keys that `engine.deepspeed` may have.  DeepSpeed ignores keys that it does not
# know, so there must be a list.
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
# Those that change DeepSpeed's own exchange of gradients.
_REDUCTION = {
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
}
# Keys of `zero_optimization` that keep state where our checkpoints do not look.
_ELSEWHERE = {
    "offload_optimizer",
    "offload_param",
    "zenflow",
    "zero_hpz_partition_size",
    "round_robin_gradients",
}


def deepspeed_config(
    cfg: Engine, micro_batch: int, accumulate: int, clip: float, size: int, overlap: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration, with `cfg.deepspeed` laid over it.

    micro_batch  images per rank and forward
    accumulate   micro batches per optimizer step
    clip         norm at which the gradients are clipped; 0: not at all
    size         the network's number of weights
    overlap      whether stages 1 and 2 exchange gradients while the backward runs
    Raises UserError for a top-level key of `cfg.deepspeed` that we decide or that is not in
    _RAW_KEYS, and for one that would keep state where our checkpoints do not look."""
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        # Always written: where the key is missing, DeepSpeed clips at 1.0.
        "gradient_clipping": clip,
        "zero_optimization": _zero(cfg, clip, size, overlap),
        # optim.create tests the optimizer.
        "zero_allow_untested_optimizer": True,
        # This timer would wait for the device in every step.
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": None,
    }
    if cfg.precision != "fp32":
        ours["torch_autocast"] = _autocast(cfg.precision)
    _refuse(cfg, decided=set(ours) - {"zero_optimization"})
    zero = ours["zero_optimization"] | cfg.deepspeed.get("zero_optimization", {})
    if zero["stage"] != cfg.stage:
        raise UserError(
            f"engine.deepspeed.zero_optimization.stage: {zero['stage']} disagrees with "
            f"engine.stage {cfg.stage}; set engine.stage"
        )
    return ours | cfg.deepspeed | {"zero_optimization": zero}


def bucket_bytes(cfg: Engine) -> int:
    """How many bytes of gradients are sent at once where they overlap with the backward."""
    return int(cfg.bucket_mb * 2**20)


def _zero(cfg: Engine, clip: float, size: int, overlap: bool) -> dict[str, Any]:
    """The block `zero_optimization`.  Its values are measured, see docs/engine.md."""
    zero: dict[str, Any] = {"stage": cfg.stage}
    if cfg.stage in (1, 2):
        zero |= {
            # One bucket for all gradients.
            "reduce_bucket_size": size,
            "reduce_scatter": False,
            "contiguous_gradients": False,
            "compute_grad_norm": clip > 0,
        }
        if overlap:
            # Several buckets: a single one would only go out at the backward's end.  DeepSpeed
            # counts elements, of 4 bytes.
            zero |= {
                "overlap_comm": True,
                "contiguous_gradients": True,
                "reduce_bucket_size": min(size, bucket_bytes(cfg) // 4),
            }
    if cfg.stage == 3:
        zero |= {"reduce_bucket_size": size, "memory_efficient_linear": False}
    return zero


def _autocast(precision: str) -> dict[str, Any]:
    """The block `torch_autocast`, for the forward alone: weights, gradients and batch-norm
    statistics stay fp32."""
    return {
        "enabled": True,
        "dtype": str(DTYPE[precision]).removeprefix("torch."),
        # None: from stage 1 on DeepSpeed would reduce the gradients of such modules in half
        # precision, unlike at stage 0.
        "lower_precision_safe_modules": [],
    }


def _refuse(cfg: Engine, decided: set[str]) -> None:
    """Refuses keys of `engine.deepspeed`; `decided` are those that we write ourselves."""
    raw = cfg.deepspeed
    if taken := [key for key in raw if key in decided]:
        raise UserError(
            f"engine.deepspeed.{taken[0]}: is made from data.*, optim.clip and engine.*; set it "
            "there"
        )
    if unknown := sorted(set(raw) - _RAW_KEYS):
        raise UserError(
            f"engine.deepspeed.{unknown[0]}: not a top-level key that can be passed to DeepSpeed, "
            f"which would ignore it silently; known: {', '.join(sorted(_RAW_KEYS))}"
        )
    if not isinstance(zero := raw.get("zero_optimization", {}), dict):
        raise UserError(
            f"engine.deepspeed.zero_optimization: keys with values are expected (found {zero!r})"
        )
    theirs = sorted(set(raw) & _REDUCTION)
    if cfg.stage == 0 and cfg.overlap and theirs:
        raise UserError(
            f"engine.deepspeed.{theirs[0]}: belongs to DeepSpeed's own exchange of gradients, "
            "which engine.overlap replaces at stage 0; set engine.overlap=false or remove it"
        )
    if elsewhere := sorted(set(zero) & _ELSEWHERE):
        raise UserError(
            f"engine.deepspeed.zero_optimization.{elsewhere[0]}: keeps weights or optimizer state "
            "where the checkpoint does not look; remove it"
        )
