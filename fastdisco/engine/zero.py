"""DeepSpeed around the student alone: its configuration made from ours, what has to be settled
before it is imported, and the weights and optimizer state of any ZeRO stage under the parameters'
names."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdisco.common import dist
from fastdisco.engine.deepspeed_engine import import_deepspeed


def gathered(engine, write: bool = False):
    """A context in which the net's weights are whole on every rank, which at stage 3 they are only
    inside its own forward and backward.

    With `write`, what rank 0 wrote into them stays.  Every rank must enter it."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    return import_deepspeed().zero.GatheredParameters(
        list(engine.module.parameters()), modifier_rank=0 if write else None
    )


def weights(engine) -> dict[str, Tensor]:
    """The state dict of the net, whole at any stage; every rank must call it."""
    with gathered(engine):
        # ZeRO's are slices of one tensor, which a file would hold whole.
        return {k: v.clone() for k, v in engine.module.state_dict().items()}


def load_weights(engine, weights: dict[str, Tensor]):
    """Sets what `weights` gave, at any stage; every rank must call it."""
    with gathered(engine, write=True):
        engine.module.load_state_dict(weights)
    if engine.zero_optimization():
        engine.optimizer.refresh_fp32_params()  # the copy that the optimizer moves


def optimizer_state(engine) -> dict[str, dict]:
    """Independent of the stage and of the number of ranks; every rank must call it.

    parameters  {parameter's name: {state's name: tensor of the parameter's shape, or what the
                optimizer keeps otherwise, such as a counter}}
    groups      {position: {setting's name: value}}, since some optimizers count there"""
    base, parameters = engine.basic_optimizer, {}
    if not engine.zero_optimization():
        parameters = {
            name: dict(base.state[p])
            for name, p in engine.module.named_parameters()
            if p in base.state
        }
    else:
        for flat, pieces in _flat_groups(engine):
            for piece in pieces if flat in base.state else ():
                parameters[piece.name] = {
                    k: _join(v, piece) if _same_shape(v, flat.shape) else v
                    for k, v in base.state[flat].items()
                }
    return {
        "parameters": parameters,
        "groups": {
            i: {k: v for k, v in g.items() if k not in _NO_STATE}
            for i, g in enumerate(base.param_groups)
        },
    }


def load_optimizer_state(engine, state: dict[str, dict]):
    """Sets what `optimizer_state` gave, at any stage, also before the first step."""
    base, saved = engine.basic_optimizer, state["parameters"]
    fused = bool(base.defaults.get("fused"))
    for i, settings in state["groups"].items():
        base.param_groups[i].update(
            {
                k: v.clone() if torch.is_tensor(v) else v
                for k, v in settings.items()
                if k not in _NO_STATE
            }
        )
    if not engine.zero_optimization():
        base.state.update(
            {
                p: {k: _like(v, p, fused) for k, v in saved[name].items()}
                for name, p in engine.module.named_parameters()
                if name in saved
            }
        )
        return
    for flat, pieces in _flat_groups(engine):
        for key, value in saved.get(pieces[0].name, {}).items():
            per_element = _same_shape(value, pieces[0].shape)
            base.state[flat][key] = (
                _cut([saved[p.name][key] for p in pieces], pieces, flat)
                if per_element
                else _like(value, flat, fused)
            )


# Of an optimizer's group; the last two follow from the device.
_NO_STATE = {"params", "fused", "foreach"}


class _Piece(NamedTuple):
    """This rank's share of a parameter: elements first .. first+n of it are elements at .. at+n of
    its group's flat tensor."""

    name: str
    shape: torch.Size
    first: int
    n: int
    at: int


def _flat_groups(engine) -> Iterator[tuple[Tensor, list[_Piece]]]:
    """The flat tensors that the optimizer holds from stage 1 on, each with all parameters of its
    group."""
    zero, names = engine.optimizer, {id(p): name for name, p in engine.module.named_parameters()}
    if engine.zero_optimization_stage() == 3:
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups):
            pieces = []
            for p in group:
                _, at, n = zero.grad_position[zero.get_param_id(p)]
                first = min(n * dist.rank(), p.ds_numel)
                # The last ranks' end is padding.
                pieces.append(
                    _Piece(names[id(p)], p.ds_shape, first, min(n, p.ds_numel - first), at)
                )
            yield flat, pieces
        return
    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups):
        mine = [p._hp_mapping for p in group]  # None: all of it is on other ranks
        yield (
            flat,
            [
                _Piece(
                    names[id(p)],
                    p.shape,
                    m.lp_fragment_address.start,
                    m.lp_fragment_address.numel,
                    m.hp_fragment_address.start,
                )
                if m
                else _Piece(names[id(p)], p.shape, 0, 0, 0)
                for p, m in zip(group, mine)
            ],
        )


def _same_shape(value, shape: torch.Size) -> bool:
    return torch.is_tensor(value) and value.shape == shape


def _join(flat: Tensor, piece: _Piece) -> Tensor:
    """The whole parameter's values out of the ranks' flat ones."""
    whole = flat.new_zeros(piece.shape.numel())
    whole[piece.first : piece.first + piece.n] = flat[piece.at : piece.at + piece.n]
    return dist.all_sum(whole).view(piece.shape)


def _cut(values: list[Tensor], pieces: list[_Piece], like: Tensor) -> Tensor:
    """This rank's flat tensor out of whole parameters' values."""
    flat = torch.zeros(like.shape, dtype=values[0].dtype, device=like.device)
    for value, piece in zip(values, pieces):
        flat[piece.at : piece.at + piece.n] = value.flatten()[piece.first : piece.first + piece.n]
    return flat


def _like(value, p: Tensor, fused: bool):
    """A copy, off the mapped file, as the optimizer keeps it beside p: in p's memory format;
    counters, which have no dimension, on the CPU but of a fused optimizer, whose kernel reads
    them."""
    if not torch.is_tensor(value):
        return value
    if _same_shape(value, p.shape):
        return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(p.device if value.dim() or fused else "cpu", copy=True)
