"""DeepSpeed around the student alone: its configuration made from ours, what has to be settled before it is imported, and the weights and
optimizer state of any ZeRO stage under the parameters' names."""
import contextlib
import logging
import os
from functools import partial
from typing import Any, Iterator, NamedTuple

import torch
from torch import Tensor, nn

from fastdisco.common import dist
from fastdisco import models
from fastdisco.config import Engine, UserError
from fastdisco.engine.exchange import Exchange


def start(cfg: Engine) -> torch.device:
    """Joins the ranks (NCCL on GPUs, gloo otherwise), sets how float32 is computed, and returns this rank's device.

    Raises UserError where the precision cannot run."""
    dist.defaults()
    device = dist.device()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cfg.tf32, False
    if cfg.precision == "fp16" and device.type == "cpu":
        raise UserError("engine.precision: fp16 needs a GPU (it overflows every step on CPU); take fp32 or bf16")
    deepspeed = _deepspeed()
    # A compiled all-reduce that only inference uses: it would cost 40 s and a compiler at the first start, and a stale lock file hangs it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    return device


def create(net: nn.Module, optimizer: torch.optim.Optimizer, cfg: Engine, micro_batch: int, accumulate: int, clip: float):
    """The DeepSpeed engine: called like `net`, with `backward(loss)` and `step()` once each micro batch.

    At stage 0 the net's weights become channels_last, and its gradients are exchanged while the backward runs.
    From stage 1 on the optimizer no longer holds the net's parameters, at stage 3 neither does the net: see `gathered`.
    Raises UserError for an optimizer or a net that DeepSpeed cannot take; optim.create and the config have refused the others."""
    if cfg.stage and isinstance(optimizer, torch.optim.Adagrad):
        raise UserError(f"optim.name: at ZeRO stage {cfg.stage} DeepSpeed makes a new Adagrad, without our weight decay and learning rates; "
                        "set engine.stage=0 or take another optimizer")
    if bare := [name for name, p in net.named_parameters() if not p.dim()]:
        raise UserError(f"student.arch: DeepSpeed cannot send a weight without dimension to the other ranks, as {bare[0]} is; take another")
    overlap = cfg.overlap and dist.device().type == "cuda" and dist.world() > 1  # alone it would only wait for the device in every backward
    told = deepspeed_config(cfg, micro_batch, accumulate, clip, models.size(net), overlap)
    deepspeed = _deepspeed()
    logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())  # optim.create has tested it
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=told)
    if clip and not cfg.stage:  # the same norm and factor; DeepSpeed's form takes a kernel or two for each weight, and waits for the device
        engine.clip_fp32_gradients = partial(nn.utils.clip_grad_norm_, list(net.parameters()), clip)
    if cfg.stage == 0:  # else the weights are slices of one flat tensor, contiguous each; channels_last views suffice for activations
        net.to(memory_format=torch.channels_last)  # not before: DeepSpeed broadcasts the weights as bytes, which needs them contiguous
        if cfg.overlap:
            # What DeepSpeed calls at the end of each backward, where its own would reduce all gradients at once.
            engine.allreduce_gradients = Exchange(net, _bytes(cfg), engine.is_gradient_accumulation_boundary).finish
    return engine


def deepspeed_config(cfg: Engine, micro_batch: int, accumulate: int, clip: float, size: int, overlap: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration with cfg.deepspeed laid over it; `size` is the net's number of weights, `overlap` whether stages 1 and 2 exchange
    gradients while the backward runs.

    Raises UserError for a top-level key other than _RAW_KEYS (ours decides it, or DeepSpeed would ignore it silently), and for what would keep
    state where our checkpoints do not look."""
    parts = {"reduce_bucket_size": size, "reduce_scatter": False, "contiguous_gradients": False, "compute_grad_norm": clip > 0}
    if overlap:  # buckets below the net's size, else the only one would go out at the end
        parts |= {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": min(size, _bytes(cfg) // 4)}
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
        # No module is "safe" for less: from stage 1 on DeepSpeed would reduce the gradients of those in half precision, unlike at stage 0.
        dtype = str(models.DTYPE[cfg.precision]).removeprefix("torch.")
        ours["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    decided = [k for k in cfg.deepspeed if k in ours and k != "zero_optimization"]
    if decided:
        raise UserError(f"engine.deepspeed.{decided[0]}: is made from data.*, optim.clip and engine.*; set it there")
    unknown = sorted(set(cfg.deepspeed) - _RAW_KEYS)
    if unknown:
        raise UserError(f"engine.deepspeed.{unknown[0]}: not a top-level key that can be passed to DeepSpeed, which would ignore it "
                        f"silently; known: {', '.join(sorted(_RAW_KEYS))}")
    raw = dict(cfg.deepspeed)
    over = raw.pop("zero_optimization", {})
    if cfg.stage == 0 and cfg.overlap and (theirs := sorted(set(raw) & _REDUCTION)):
        raise UserError(f"engine.deepspeed.{theirs[0]}: belongs to DeepSpeed's own exchange of gradients, which engine.overlap replaces at stage 0; "
                        "set engine.overlap=false or remove it")
    if elsewhere := sorted(set(over) & _ELSEWHERE):
        raise UserError(f"engine.deepspeed.zero_optimization.{elsewhere[0]}: keeps weights or optimizer state where the checkpoint does not look; "
                        "remove it")
    zero = zero | over
    if zero["stage"] != cfg.stage:
        raise UserError(f"engine.deepspeed.zero_optimization.stage: {zero['stage']} disagrees with engine.stage {cfg.stage}; set engine.stage")
    return ours | raw | {"zero_optimization": zero}


def gathered(engine, write: bool = False):
    """A context in which the net's weights are whole on every rank, which at stage 3 they are only inside its own forward and backward.

    With `write`, what rank 0 wrote into them stays.  Every rank must enter it."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    return _deepspeed().zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0 if write else None)


def weights(engine) -> dict[str, Tensor]:
    """The state dict of the net, whole at any stage; every rank must call it."""
    with gathered(engine):
        return {k: v.clone() for k, v in engine.module.state_dict().items()}  # ZeRO's are slices of one tensor, which a file would hold whole


def load_weights(engine, weights: dict[str, Tensor]):
    """Sets what `weights` gave, at any stage; every rank must call it."""
    with gathered(engine, write=True):
        engine.module.load_state_dict(weights)
    if engine.zero_optimization():
        engine.optimizer.refresh_fp32_params()  # the copy that the optimizer moves


def optimizer_state(engine) -> dict[str, dict]:
    """Independent of the stage and of the number of ranks; every rank must call it.

    parameters  {parameter's name: {state's name: tensor of the parameter's shape, or what the optimizer keeps otherwise, such as a counter}}
    groups      {position: {setting's name: value}}, since some optimizers count there"""
    base, parameters = engine.basic_optimizer, {}
    if not engine.zero_optimization():
        parameters = {name: dict(base.state[p]) for name, p in engine.module.named_parameters() if p in base.state}
    else:
        for flat, pieces in _flat_groups(engine):
            for piece in pieces if flat in base.state else ():
                parameters[piece.name] = {k: _join(v, piece) if _same_shape(v, flat.shape) else v for k, v in base.state[flat].items()}
    return {"parameters": parameters, "groups": {i: {k: v for k, v in g.items() if k not in _NO_STATE} for i, g in enumerate(base.param_groups)}}


def load_optimizer_state(engine, state: dict[str, dict]):
    """Sets what `optimizer_state` gave, at any stage, also before the first step."""
    base, saved = engine.basic_optimizer, state["parameters"]
    fused = bool(base.defaults.get("fused"))
    for i, settings in state["groups"].items():
        base.param_groups[i].update({k: v.clone() if torch.is_tensor(v) else v for k, v in settings.items() if k not in _NO_STATE})
    if not engine.zero_optimization():
        base.state.update({p: {k: _like(v, p, fused) for k, v in saved[name].items()}
                           for name, p in engine.module.named_parameters() if name in saved})
        return
    for flat, pieces in _flat_groups(engine):
        for key, value in saved.get(pieces[0].name, {}).items():
            per_element = _same_shape(value, pieces[0].shape)
            base.state[flat][key] = _cut([saved[p.name][key] for p in pieces], pieces, flat) if per_element else _like(value, flat, fused)


def autocast(precision: str, device: torch.device, cache: bool = True):
    """The precision of the forward passes that do not go through the engine: mean student, evaluation.

    cache  keep weights that were cast until the context ends; not in a CUDA graph, which must cast them anew in each replay"""
    return torch.autocast(device.type, dtype=models.DTYPE[precision], enabled=precision != "fp32", cache_enabled=cache)


def scaler(engine) -> torch.amp.GradScaler | None:
    """The loss scaler of fp16 at ZeRO stage 0, else None."""
    return engine.torch_autocast_z0_gradscaler


def stop():
    """Leaves the process group, so that the process ends without complaint."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# DeepSpeed ignores unknown top-level keys, so ours names the ones that make sense here.
_RAW_KEYS = {"zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "comms_logger", "flops_profiler",
             "wall_clock_breakdown", "memory_breakdown", "dump_state", "compile"}
_REDUCTION = {"communication_data_type", "prescale_gradients", "gradient_predivide_factor", "comms_logger"}
_ELSEWHERE = {"offload_optimizer", "offload_param", "zenflow", "zero_hpz_partition_size", "round_robin_gradients"}
_NO_STATE = {"params", "fused", "foreach"}  # of an optimizer's group; the last two follow from the device


def _bytes(cfg: Engine) -> int:
    return int(cfg.bucket_mb * 2**20)


class _Piece(NamedTuple):
    """This rank's share of a parameter: elements first .. first+n of it are elements at .. at+n of its group's flat tensor."""

    name: str
    shape: torch.Size
    first: int
    n: int
    at: int


def _flat_groups(engine) -> Iterator[tuple[Tensor, list[_Piece]]]:
    """The flat tensors that the optimizer holds from stage 1 on, each with all parameters of its group."""
    zero, names = engine.optimizer, {id(p): name for name, p in engine.module.named_parameters()}
    if engine.zero_optimization_stage() == 3:
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups):
            pieces = []
            for p in group:
                _, at, n = zero.grad_position[zero.get_param_id(p)]
                first = min(n * dist.rank(), p.ds_numel)
                pieces.append(_Piece(names[id(p)], p.ds_shape, first, min(n, p.ds_numel - first), at))  # the last ranks' end is padding
            yield flat, pieces
        return
    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups):
        mine = [p._hp_mapping for p in group]  # None: all of it is on other ranks
        yield flat, [_Piece(names[id(p)], p.shape, m.lp_fragment_address.start, m.lp_fragment_address.numel, m.hp_fragment_address.start)
                     if m else _Piece(names[id(p)], p.shape, 0, 0, 0) for p, m in zip(group, mine)]


def _same_shape(value, shape: torch.Size) -> bool:
    return torch.is_tensor(value) and value.shape == shape


def _join(flat: Tensor, piece: _Piece) -> Tensor:
    """The whole parameter's values out of the ranks' flat ones."""
    whole = flat.new_zeros(piece.shape.numel())
    whole[piece.first:piece.first + piece.n] = flat[piece.at:piece.at + piece.n]
    return dist.all_sum(whole).view(piece.shape)


def _cut(values: list[Tensor], pieces: list[_Piece], like: Tensor) -> Tensor:
    """This rank's flat tensor out of whole parameters' values."""
    flat = torch.zeros(like.shape, dtype=values[0].dtype, device=like.device)
    for value, piece in zip(values, pieces):
        flat[piece.at:piece.at + piece.n] = value.flatten()[piece.first:piece.first + piece.n]
    return flat


def _like(value, p: Tensor, fused: bool):
    """A copy, off the mapped file, as the optimizer keeps it beside p: in p's memory format; counters, which have no dimension, on the CPU but of
    a fused optimizer, whose kernel reads them."""
    if not torch.is_tensor(value):
        return value
    if _same_shape(value, p.shape):
        return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(p.device if value.dim() or fused else "cpu", copy=True)


def _deepspeed():
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it says on every rank that it found no GPU
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    import deepspeed
    return deepspeed
