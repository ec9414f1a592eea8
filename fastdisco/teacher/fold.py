"""Batch norm in eval mode is one multiplication and addition for each channel: folded into the
convolution or linear layer whose output it takes."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdisco.common.errors import UserError

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


class Pair(NamedTuple):
    """A batch norm and the layer that alone feeds it, with what they saw."""

    layer: Layer
    norm: _BatchNorm
    # The layer's input and its output.
    x: Tensor
    y: Tensor


@torch.no_grad()
def fold(net: nn.Module, probe: list[Tensor]) -> int:
    """Folds, in place, every batch norm that can be, and returns how many; its activation, where it
    has one (BatchNormAct2d), stays.

    net    in eval mode, called as net(probe).z
    Which layer feeds which norm is seen in that call, not guessed from names.  A pair is left as it
    is where
    - something else reads the layer's output,
    - either is called more than once or shares its weights,
    - the folded layer does not give the same (a convolution that standardises its weights).
    Raises UserError where the whole network then differs by more than rounding."""
    want, pairs = _run(net, probe)
    if not pairs:
        return 0
    folded = 0
    for layer, norm, x, y in pairs:
        new, goal = _folded(layer, norm), _affine(norm, y)
        # So written that nan fails, too.
        if not (new(x) - goal).abs().max() <= 1e-4 * goal.abs().max():
            continue
        # Its new weight and bias.
        layer._parameters.update(new._parameters)
        _replace(net, norm)
        folded += 1
    got = net(probe).z
    off = ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()
    if not off < 1e-3:
        raise UserError(
            f"teacher.fold: folding {folded} batch norms into the layers before them changes the "
            f"embedding by {off:.2g} of its largest number; set teacher.fold=false"
        )
    return folded


class _Uses(TorchDispatchMode):
    """Counts how many ops read each of the tensors that are watched."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and id(x) in self.count:
                self.count[id(x)] += 1
        return func(*args, **(kwargs or {}))


def _run(net: nn.Module, probe: list[Tensor]) -> tuple[Tensor, list[Pair]]:
    """The output of net(probe), and the pairs that may be folded."""
    layers, norms = _candidates(net)
    uses, found = _Uses(), []
    calls: dict[nn.Module, int] = {}
    # By id of a layer's output.
    made: dict[int, tuple[Layer, Tensor, Tensor]] = {}

    def after(layer: Layer, args: tuple[Tensor], y: Tensor) -> None:
        calls[layer] = calls.get(layer, 0) + 1
        # y is held so that its id stays its own; x is cloned, for what follows may write into it.
        made[id(y)] = layer, args[0].clone(), y
        uses.count[id(y)] = 0

    def before(norm: _BatchNorm, args: tuple[Tensor]) -> None:
        calls[norm] = calls.get(norm, 0) + 1
        if id(args[0]) in made:
            layer, x, y = made[id(args[0])]
            # Of a linear layer's output of more dimensions the norm takes other channels.
            if not isinstance(layer, nn.Linear) or y.ndim == 2:
                found.append(Pair(layer, norm, x, y))

    hooks = [m.register_forward_hook(after) for m in layers]
    hooks += [m.register_forward_pre_hook(before) for m in norms]
    with uses:
        want = net(probe).z
    for h in hooks:
        h.remove()
    once = lambda p: calls[p.layer] == calls[p.norm] == 1
    return want, [p for p in found if uses.count[id(p.y)] == 1 and once(p)]


def _candidates(net: nn.Module) -> tuple[list[Layer], list[_BatchNorm]]:
    """Layers and batch norms whose weights are their own alone."""
    # Of each weight, by its id.
    owners: dict[int, list[nn.Module]] = {}
    for m in net.modules():
        for p in m._parameters.values():
            owners.setdefault(id(p), []).append(m)
    alone = lambda m: all(len(owners[id(p)]) == 1 for p in m._parameters.values() if p is not None)
    layers, norms = [], []
    for m in filter(alone, net.modules()):
        if isinstance(m, _LAYERS):
            # A parametrized weight is computed anew in each forward.
            if m._parameters.get("weight") is not None and not parametrize.is_parametrized(m):
                layers.append(m)
        elif isinstance(m, _BatchNorm) and m.running_var is not None:
            norms.append(m)
    return layers, norms


def _affine(norm: _BatchNorm, y: Tensor) -> Tensor:
    """What the norm makes of y, without its activation."""
    return nn.functional.batch_norm(
        y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )


def _folded(layer: Layer, norm: _BatchNorm) -> Layer:
    """A layer whose output is the norm's, computed in float64."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None
    scale = (var.double() + norm.eps).rsqrt()
    shift = -mean.double()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    if layer.bias is not None:
        shift = layer.bias.double() + shift
    bias = shift * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    # Channels first, and as many dimensions as the weight.
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))

    new, dtype = copy.deepcopy(layer), layer.weight.dtype
    new.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    new.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return new


def _replace(net: nn.Module, norm: _BatchNorm) -> None:
    """Puts in the norm's place what it does besides normalising."""
    # BatchNormAct2d's dropout and activation, in that order.
    rest = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    new = nn.Sequential(*rest) if rest else nn.Identity()
    new.train(False)
    for m in net.modules():
        for name, child in list(m._modules.items()):
            if child is norm:
                m._modules[name] = new
