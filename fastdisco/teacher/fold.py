"""Batch norm in eval mode is one multiplication and addition a channel: folded into the convolution
or linear layer whose output it takes."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdisco.common.errors import UserError

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@torch.no_grad()
def fold(net: nn.Module, probe: list[Tensor]) -> int:
    """Folds, in place, every batch norm that can be, and returns how many; its activation, where it
    has one (BatchNormAct2d), stays.

    net    in eval mode, called as net(probe).z
    Which layer feeds which norm is seen in that call, not guessed from names.  A pair is left as it
    is where something else reads the layer's output, where either is called more than once or
    shares its weights, or where the folded layer does not give the same (a convolution that
    standardises its weights).  Raises UserError where the whole network then differs by more than
    rounding."""
    want, pairs = _run(net, probe)
    if not pairs:
        return 0
    folded = 0
    for layer, norm, x, y in pairs:
        new = _folded(layer, norm)
        scale = (goal := _affine(norm, y)).abs().max()
        if not (new(x) - goal).abs().max() <= 1e-4 * scale:
            continue
        layer.weight, layer.bias = new.weight, new.bias
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
    """How many ops read each of the tensors that are watched."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and id(x) in self.count:
                self.count[id(x)] += 1
        return func(*args, **(kwargs or {}))


def _run(
    net: nn.Module, probe: list[Tensor]
) -> tuple[Tensor, list[tuple[nn.Module, nn.Module, Tensor, Tensor]]]:
    """Output, and (layer, norm, the layer's input, its output) of every pair that may be folded."""
    owners = {}  # of each weight
    for m in net.modules():
        for p in m._parameters.values():
            owners.setdefault(id(p), []).append(m)
    alone = lambda m: all(len(owners[id(p)]) == 1 for p in m._parameters.values() if p is not None)
    layers = [
        m
        for m in net.modules()
        if isinstance(m, _LAYERS)
        and m._parameters.get("weight") is not None
        and not parametrize.is_parametrized(m)
        and alone(m)
    ]
    norms = [
        m
        for m in net.modules()
        if isinstance(m, _BatchNorm) and m.running_var is not None and alone(m)
    ]
    uses, calls, made, found = _Uses(), {}, {}, []

    def after(layer, args, y):
        calls[layer] = calls.get(layer, 0) + 1
        # Holds y, so that its id stays its own; cloned, since what follows may write into it.
        made[id(y)] = layer, args[0].clone(), y
        uses.count[id(y)] = 0

    def before(norm, args):
        calls[norm] = calls.get(norm, 0) + 1
        if id(args[0]) in made:
            layer, x, y = made[id(args[0])]
            # Else the channels of the norm are not the layer's.
            if not isinstance(layer, nn.Linear) or y.ndim == 2:
                found.append((layer, norm, x, y))

    hooks = [m.register_forward_hook(after) for m in layers] + [
        m.register_forward_pre_hook(before) for m in norms
    ]
    with uses:
        want = net(probe).z
    for h in hooks:
        h.remove()
    return want, [p for p in found if uses.count[id(p[3])] == 1 and calls[p[0]] == calls[p[1]] == 1]


def _affine(norm: _BatchNorm, y: Tensor) -> Tensor:
    """What the norm makes of y, without its activation."""
    return nn.functional.batch_norm(
        y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )


def _folded(layer: nn.Module, norm: _BatchNorm) -> nn.Module:
    new = copy.deepcopy(layer)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = (
        -norm.running_mean.double()
        if layer.bias is None
        else layer.bias.double() - norm.running_mean.double()
    )
    bias = shift * scale + (0 if norm.bias is None else norm.bias.double())
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    new.weight, new.bias = (
        nn.Parameter(x.to(layer.weight.dtype), requires_grad=False) for x in (weight, bias)
    )
    return new


def _replace(net: nn.Module, norm: _BatchNorm):
    """By what it does besides normalising."""
    # BatchNormAct2d's dropout and activation, in that order.
    rest = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    new = nn.Sequential(*rest) if rest else nn.Identity()
    for m in net.modules():
        for name, child in list(m._modules.items()):
            if child is norm:
                m._modules[name] = new.train(False)
