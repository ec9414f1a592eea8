"""Whether what a checkpoint holds is what the run's items take: a file may be intact and its content
another one.  torch itself would cast, broadcast, or fail in the middle of a step.

Each function raises ValueError, whose text says what is wrong."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Steps and positions beyond it are no counts.
_MOST = 2**53


def state_dict(found: Any, own: Mapping[str, Any], shapes: bool = True) -> None:
    """A module's: the same names, and tensors of the same kinds.

    shapes  whether the tensors in `own` have the shapes that are saved; a module's own hooks may
    still change them"""
    _names(found, own)
    for name, x in own.items():
        if isinstance(x, Tensor):
            _tensor(name, found[name], x)
            if shapes and found[name].shape != x.shape:
                raise ValueError(f"{name} is {tuple(found[name].shape)}, not {tuple(x.shape)}")


def count(found: Any, least: int = 0) -> None:
    if type(found) is not int or not least <= found < _MOST:
        raise ValueError(f"it is {_kind(found)}, not a count")


def loader(found: Any) -> None:
    """The data loader's: a position, or a dict of one and of the images that were set aside."""
    if not isinstance(found, dict):
        count(found)
        return
    _names(found, {"position": 0, "aside": {}})
    count(found["position"])
    for index, why in _dict(found["aside"], "aside").items():
        count(index)
        if not isinstance(why, str):
            raise ValueError(f"aside of image {index} is {_kind(why)}, not a reason")


def optimizer(found: Any, shapes: Mapping[str, torch.Size], groups: list[dict[str, Any]]) -> None:
    """The state of `engine.optimizer_state`.  shapes: of the network's weights; groups: the
    optimizer's own, before."""
    _names(found, {"parameters": 0, "groups": 0})
    for name, state in _dict(found["parameters"], "parameters").items():
        if name not in shapes:
            raise ValueError(f"parameters has {str(name)[:60]!r}, which the network has not")
        for key, x in _dict(state, str(name)).items():
            _state(f"{name}: {key}", x, shapes[name])
    # The state of a weight without dimensions looks like a counter.
    _like_each_other({k: v for k, v in found["parameters"].items() if shapes[k]})
    _names(_dict(found["groups"], "groups"), dict(enumerate(groups)))
    for i, own in enumerate(groups):
        settings = _dict(found["groups"][i], f"group {i}")
        for key in settings.keys() & own.keys():
            sorts = {_sort(settings[key]), _sort(own[key])}
            # A learning rate may be a tensor.
            if len(sorts) > 1 and "None" not in sorts and sorts != {"number", "counter"}:
                raise ValueError(f"group {i}: {key} is {_kind(settings[key])}")


def scaler(found: Any, own: Mapping[str, Any] | None) -> None:
    """The loss scaler's, which may be None where the run has none."""
    if own:
        _names(found, own)
        for key, value in own.items():
            if _sort(found[key]) != _sort(value):
                raise ValueError(f"{key} is {_kind(found[key])}")


def random(found: Any) -> None:
    """A rank's random state."""
    _names(found, {"cpu": 0, "cuda": 0})
    # Sets the state, and then has it as before.
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_rng_state(found["cpu"])
        except (TypeError, RuntimeError, AttributeError):
            raise ValueError("cpu is no random state") from None
    if found["cuda"] is not None and not isinstance(found["cuda"], Tensor):
        raise ValueError(f"cuda is {_kind(found['cuda'])}")


def _names(found: Any, own: Mapping[Any, Any]) -> None:
    _dict(found, "it")
    if lacks := [str(k) for k in own if k not in found]:
        raise ValueError(f"it lacks {lacks[0]}")
    if more := [str(k)[:60] for k in found if k not in own]:
        raise ValueError(f"it has {more[0]!r}, which nothing here has")


def _dict(found: Any, what: str) -> dict[Any, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{what} is {_kind(found)}, not a dict")
    return found


def _tensor(name: str, found: Any, own: Tensor) -> None:
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_meta:
        raise ValueError(f"{name} is {_kind(found)}, not a tensor")
    if (found.is_floating_point(), found.is_complex()) != (own.is_floating_point(), False):
        raise ValueError(f"{name} is {_kind(found)}, not of {own.dtype}")


def _state(name: str, found: Any, shape: torch.Size) -> None:
    """A tensor beside a weight is a counter, or has its shape or the sizes of some of its
    dimensions, as Adafactor's; DINO's gain once was [P], not [P,1]."""
    if isinstance(found, Tensor) and found.dim():
        _tensor(name, found, torch.zeros(0))
        part = found.dim() < len(shape) and set(found.shape) <= set(shape)
        if found.shape != shape and not part:
            raise ValueError(f"{name} is {tuple(found.shape)}, not {tuple(shape)}")
    elif _sort(found) not in ("number", "counter", "bool", "None"):
        raise ValueError(f"{name} is {_kind(found)}")


def _like_each_other(states: dict[str, dict[str, Any]]) -> None:
    """Most weights have state of the same names and kinds: one that lacks a name, or has another
    kind, was not saved so.  Other names altogether are those of an optimizer that treats some
    weights in another way."""
    names = Counter(frozenset(state) for state in states.values())
    kinds = Counter((key, _exact(x)) for state in states.values() for key, x in state.items())
    for name, state in states.items():
        has = frozenset(state)
        empty = not any(isinstance(x, Tensor) and x.dim() for x in state.values())
        usual = next(
            (k for k, n in names.items() if n > 2 and (has < k or (empty and has != k))), None
        )
        if usual and names[has] == 1:
            raise ValueError(f"{name} lacks {min(map(str, usual - has))}")
        for key, x in state.items():
            most = max(n for (k, _), n in kinds.items() if k == key)
            if most > 2 and kinds[key, _exact(x)] == 1:
                raise ValueError(f"{name}: {key} is {_kind(x)}")


def _exact(x: Any) -> tuple[str, Any]:
    return _sort(x), x.dtype if isinstance(x, Tensor) else None


def _sort(x: Any) -> str:
    """Kinds that may stand for each other have the same."""
    if isinstance(x, (list, tuple)):
        return f"{len(x)} of {sorted({_sort(y) for y in x})}"
    if isinstance(x, Tensor):
        counts = x.dim() == 0 and x.dtype != torch.bool and not x.is_complex()
        return "counter" if counts else "tensor"
    if x is None or isinstance(x, bool):
        return "None" if x is None else "bool"
    return "number" if isinstance(x, (int, float)) else type(x).__name__


def _kind(x: Any) -> str:
    """What it is, in few words."""
    if isinstance(x, Tensor):
        return f"a tensor of {x.dtype}"
    return f"a {type(x).__name__}" if x is not None else "None"
