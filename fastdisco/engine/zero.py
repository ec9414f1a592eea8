"""Weights and optimizer state of the student, whole and under the parameters' names, at any ZeRO
stage.

From stage 1 on the optimizer holds flat tensors, each of them this rank's part of all parameters of
a group laid end to end.  At stage 3 the network holds parts of its parameters, too.  Checkpoints
know nothing of that: they have each parameter whole, so that they load at any stage and on any
number of ranks."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastdisco.common import dist
from fastdisco.engine.deepspeed_engine import import_deepspeed

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Settings of an optimizer's group that are no state.  The last two follow from the device.
_NO_STATE = {"params", "fused", "foreach"}


def gathered(
    engine: "DeepSpeedEngine", write: bool = False
) -> contextlib.AbstractContextManager[None]:
    """A context in which every rank has the network's weights whole.  At stage 3 they are otherwise
    whole only inside the network's own forward and backward.

    write  at the end, all ranks take over what rank 0 has written into the weights
    Every rank must enter it."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    return import_deepspeed().zero.GatheredParameters(
        list(engine.module.parameters()), modifier_rank=0 if write else None
    )


def weights(engine: "DeepSpeedEngine") -> dict[str, Tensor]:
    """The network's state dict, whole, as copies.  Every rank must call it."""
    with gathered(engine):
        # ZeRO's weights are slices of one tensor, and saving a slice would save that tensor.
        return {k: v.clone() for k, v in engine.module.state_dict().items()}


def load_weights(engine: "DeepSpeedEngine", weights: dict[str, Tensor]) -> None:
    """Sets what `weights` returned, at this or another stage.  Every rank must call it."""
    with gathered(engine, write=True):
        engine.module.load_state_dict(weights)
    if engine.zero_optimization():
        # The optimizer moves a copy of its own.
        engine.optimizer.refresh_fp32_params()


def optimizer_state(engine: "DeepSpeedEngine") -> dict[str, dict]:
    """The optimizer's state, the same at any stage and number of ranks.  Every rank must call it.

    parameters  {parameter's name: {state's name: value}}, where the value is a tensor of the
                parameter's shape or whatever else the optimizer keeps, such as a counter
    groups      {position of the group: {setting's name: value}}, since some optimizers count there
    """
    base = engine.basic_optimizer
    if engine.zero_optimization():
        parameters = _state_of_flat_groups(engine)
    else:
        named = engine.module.named_parameters()
        parameters = {name: dict(base.state[p]) for name, p in named if p in base.state}
    groups = {}
    for i, group in enumerate(base.param_groups):
        groups[i] = {k: v for k, v in group.items() if k not in _NO_STATE}
    return {"parameters": parameters, "groups": groups}


def load_optimizer_state(engine: "DeepSpeedEngine", state: dict[str, dict]) -> None:
    """Sets what `optimizer_state` returned, at this or another stage; also before any step."""
    base, saved = engine.basic_optimizer, _as_columns(engine, state["parameters"])
    fused = bool(base.defaults.get("fused"))
    for i, settings in state["groups"].items():
        for key, value in settings.items():
            if key not in _NO_STATE:
                base.param_groups[i][key] = value.clone() if torch.is_tensor(value) else value
    if not engine.zero_optimization():
        for name, p in engine.module.named_parameters():
            if name in saved:
                base.state[p] = {k: _like(v, p, fused) for k, v in saved[name].items()}
        return
    for flat, pieces in flat_groups(engine):
        # All parameters of a group have state of the same names and kinds.
        for key, value in saved.get(pieces[0].name, {}).items():
            if _same_shape(value, pieces[0].shape):
                base.state[flat][key] = _cut([saved[p.name][key] for p in pieces], pieces, flat)
            else:
                base.state[flat][key] = _like(value, flat, fused)


def _as_columns(engine: "DeepSpeedEngine", saved: dict[str, dict]) -> dict[str, dict]:
    """The saved state, that of weights [P,1] in that shape.

    Checkpoints once had DINO's gain as [P], and the state beside it."""
    found = dict(saved)
    for name, p in engine.module.named_parameters():
        # At stage 3 p itself is empty.
        shape = getattr(p, "ds_shape", p.shape)
        tensors = [v for v in saved.get(name, {}).values() if torch.is_tensor(v) and v.dim()]
        if len(shape) == 2 and shape[1] == 1 and all(v.shape == shape[:1] for v in tensors):
            found[name] = {
                k: v[:, None] if torch.is_tensor(v) and v.dim() else v
                for k, v in saved.get(name, {}).items()
            }
    return found


class _Piece(NamedTuple):
    """This rank's part of a parameter: its elements first .. first+n are the elements at .. at+n of
    its group's flat tensor."""

    name: str
    # Of the whole parameter.
    shape: torch.Size
    first: int
    n: int
    at: int


def flat_groups(engine: "DeepSpeedEngine") -> Iterator[tuple[Tensor, list[_Piece]]]:
    """The flat tensors that the optimizer holds from stage 1 on, each with all the parameters of
    its group, in their order."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    names = {id(p): name for name, p in engine.module.named_parameters()}
    if stage == 3:
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups):
            yield flat, [_piece_at_stage_3(zero, p, names[id(p)]) for p in group]
    else:
        for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups):
            yield flat, [_piece_below_stage_3(p, names[id(p)]) for p in group]


def _piece_at_stage_3(zero: Any, p: Any, name: str) -> _Piece:
    _, at, n = zero.grad_position[zero.get_param_id(p)]
    # Each rank has n elements; the last ones' end is padding.
    first = min(n * dist.rank(), p.ds_numel)
    return _Piece(name, p.ds_shape, first, min(n, p.ds_numel - first), at)


def _piece_below_stage_3(p: Any, name: str) -> _Piece:
    if p._hp_mapping is None:
        # All of the parameter is on other ranks.
        return _Piece(name, p.shape, 0, 0, 0)
    # lp is the network's own tensor, hp the flat tensor that the optimizer moves.
    lp, hp = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
    return _Piece(name, p.shape, lp.start, lp.numel, hp.start)


def _state_of_flat_groups(engine: "DeepSpeedEngine") -> dict[str, dict[str, Any]]:
    """{parameter's name: {state's name: value}} from stage 1 on."""
    base, parameters = engine.basic_optimizer, {}
    for flat, pieces in flat_groups(engine):
        for piece in pieces if flat in base.state else ():
            state = base.state[flat]
            parameters[piece.name] = {
                k: _join(v, piece) if _same_shape(v, flat.shape) else v for k, v in state.items()
            }
    return parameters


def _same_shape(value: object, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _join(flat: Tensor, piece: _Piece) -> Tensor:
    """A parameter's values, whole, out of all ranks' flat tensors."""
    whole = flat.new_zeros(piece.shape.numel())
    whole[piece.first : piece.first + piece.n] = flat[piece.at : piece.at + piece.n]
    return dist.all_sum(whole).view(piece.shape)


def _cut(values: list[Tensor], pieces: list[_Piece], like: Tensor) -> Tensor:
    """This rank's flat tensor out of whole parameters' values."""
    flat = torch.zeros(like.shape, dtype=values[0].dtype, device=like.device)
    for value, piece in zip(values, pieces):
        flat[piece.at : piece.at + piece.n] = value.flatten()[piece.first : piece.first + piece.n]
    return flat


def _like(value: Any, p: Tensor, fused: bool) -> Any:
    """A copy of a saved value as the optimizer keeps it beside p, independent of the mapped file.

    A tensor of p's shape is in p's memory format and on its device.  A counter, which has no
    dimension, is on the CPU, except that of a fused optimizer, whose kernel reads it."""
    if not isinstance(value, Tensor):
        return value
    if _same_shape(value, p.shape):
        return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(p.device if value.dim() or fused else "cpu", copy=True)
