"""Batch norm whose training statistics are of part of a rank's batch, or of all ranks' batches.

Shapes: B images on this rank, C channels."""

from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.models.net import Net
from fastdisco.models.syncbn import SYNCED


def split_bn(net: nn.Module, groups: int) -> None:
    """Makes every batch norm of the module compute its training statistics per slice of B/groups
    consecutive images.  In place.

    Each slice is normalised as a GPU with that slice alone would do it.  The running statistics
    become the mean of the slices' updates.  State-dict keys and eval mode do not change, and with
    1 group nothing does.  Raises UserError for an unknown kind of batch norm."""
    if groups == 1:
        return
    if isinstance(net, Net):
        net.groups = groups
    for name, m in _norms(net):
        if type(m) not in _SPLIT:
            raise UserError(
                f"bn.groups: the {type(m).__name__} at {name} cannot be split into {groups}; "
                "set bn.groups=1 or take another student.arch"
            )
        # Its class changes and not the object, whose parameters, buffers and hooks others hold.
        m.__class__ = _SPLIT[type(m)]
        cast(_Split, m).groups = groups


def sync_bn(net: nn.Module) -> nn.Module:
    """The module with batch norms whose training statistics are of all ranks' batches.

    It is the module itself, changed in place; its state-dict keys stay.  With one rank nothing
    changes.  Raises UserError for an unknown kind of batch norm."""
    if dist.world() > 1:
        for name, m in _norms(net):
            if type(m) not in SYNCED:
                raise UserError(
                    f"bn.sync: the {type(m).__name__} at {name} cannot be synchronised over ranks; "
                    "set bn.sync=false or take another student.arch"
                )
            m.__class__ = SYNCED[type(m)]
    return net


def has_batch_norms(net: nn.Module) -> bool:
    """Whether anything in the module has statistics of a batch."""
    return bool(_norms(net))


def mean_buffers(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the floating-point buffers, averaged over ranks.

    Batch-norm statistics are such buffers and differ between ranks.  Every rank must call it."""
    floating = {name: b for name, b in net.named_buffers() if b.is_floating_point()}
    return {name: dist.all_mean(b.detach().clone()) for name, b in floating.items()}


def _norms(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of everything with batch statistics: EvoNorm has them, too, without being a
    batch norm of torch's."""
    return [
        (name, m)
        for name, m in net.named_modules()
        if isinstance(m, _BatchNorm) or getattr(m, "running_var", None) is not None
    ]


class _Split(_BatchNorm):
    """The forward of a split batch norm; the class beside it says which batch norm it splits."""

    groups: int

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if len(input) % self.groups:
            raise ValueError(f"a batch of {len(input)} does not split into {self.groups} groups")
        y = self._normalised(input.chunk(self.groups))
        # timm's class normalises, drops and activates in one forward.
        return self.act(self.drop(y)) if isinstance(self, BatchNormAct2d) else y

    def _normalised(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Slices [B/groups,C,...] -> [B,C,...].  Moves the running statistics, if there are any."""
        # Slices and one concatenation take 24 % longer than the plain module, in channels_last on
        # the CPU.  A reshape into groups*C channels takes 4 times as long.
        mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        # Made with track_running_stats=False it has none of the three.
        if mean is None or var is None or batches is None:
            return torch.cat([self._slice(part, None, None, 0.0) for part in parts])
        batches.add_(1)
        share = 1 / float(batches) if self.momentum is None else self.momentum
        # [groups,C]: each slice moves a copy of its own.
        means, variances = mean.repeat(self.groups, 1), var.repeat(self.groups, 1)
        y = [self._slice(part, means[g], variances[g], share) for g, part in enumerate(parts)]
        mean.copy_(means.mean(0))
        var.copy_(variances.mean(0))
        return torch.cat(y)

    def _slice(self, x: Tensor, mean: Tensor | None, var: Tensor | None, share: float) -> Tensor:
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, share, self.eps)


class SplitBatchNorm1d(_Split, nn.BatchNorm1d):
    pass


class SplitBatchNorm2d(_Split, nn.BatchNorm2d):
    pass


# timm calls the forward's argument x where torch has input; it is passed by position.
# pyrefly: ignore[inconsistent-inheritance]
class SplitBatchNormAct2d(_Split, BatchNormAct2d):
    pass


_SPLIT: dict[type[nn.Module], type[_Split]] = {
    nn.BatchNorm1d: SplitBatchNorm1d,
    nn.BatchNorm2d: SplitBatchNorm2d,
    BatchNormAct2d: SplitBatchNormAct2d,
}
