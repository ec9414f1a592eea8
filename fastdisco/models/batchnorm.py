"""Batch norm whose statistics are of part of a rank's batch, or of the batches of all ranks."""

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdisco.common import dist
from fastdisco.common.errors import UserError


def split_bn(net: nn.Module, groups: int):
    """Turns every batch norm of the module, in place, into one whose training statistics are per
    slice of B/groups consecutive images.

    Each slice is normalised as a rank of its own would do it; the running statistics become the
    mean of the slices' updates. State-dict keys and eval mode stay as they are, and at 1 group
    everything does.  Raises UserError for an unknown kind of batch norm."""
    if groups == 1:
        return
    net.groups = groups
    for name, m in net.named_modules():
        # EvoNorm has batch statistics but is no batch norm.
        if isinstance(m, _BatchNorm) or getattr(m, "running_var", None) is not None:
            if type(m) not in _SPLIT:
                raise UserError(
                    f"bn.groups: the {type(m).__name__} at {name} cannot be split into {groups}; "
                    "set bn.groups=1 or take another student.arch"
                )
            # The object stays: its parameters, buffers and hooks are shared with others.
            m.__class__ = _SPLIT[type(m)]
            m.groups = groups


def sync_bn(net: nn.Module) -> nn.Module:
    """Training statistics of every batch norm over all ranks.  Raises UserError on CPUs, where
    torch cannot."""
    if dist.world() == 1:
        return net
    if dist.device().type != "cuda":
        raise UserError(
            f"bn.sync: torch has no synchronised batch norm for the CPU, on which {dist.world()} "
            "ranks run here; set bn.sync=false"
        )
    return convert_sync_batchnorm(net)


def mean_buffers(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the floating buffers, averaged over ranks, whose batch-norm statistics differ;
    every rank must call it."""
    return {
        k: dist.all_mean(b.detach().clone())
        for k, b in net.named_buffers()
        if b.is_floating_point()
    }


class _Split:
    """The forward of a split batch norm, before the kind of batch norm it is."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if len(x) % self.groups:
            raise ValueError(f"a batch of {len(x)} does not split into {self.groups} groups")
        share, mean, var = 0.0, [None] * self.groups, [None] * self.groups
        if self.running_mean is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            # [groups,C]
            mean, var = (b.repeat(self.groups, 1) for b in (self.running_mean, self.running_var))
        # Slices and one concatenation: in channels_last on CPU 24 % over the plain module, a
        # reshape into groups*C channels 4 times it.
        y = torch.cat(
            [
                F.batch_norm(part, mean[g], var[g], self.weight, self.bias, True, share, self.eps)
                for g, part in enumerate(x.chunk(self.groups))
            ]
        )
        if self.running_mean is not None:
            self.running_mean.copy_(mean.mean(0))
            self.running_var.copy_(var.mean(0))
        return self.act(self.drop(y)) if isinstance(self, BatchNormAct2d) else y


class SplitBatchNorm1d(_Split, nn.BatchNorm1d):
    pass


class SplitBatchNorm2d(_Split, nn.BatchNorm2d):
    pass


class SplitBatchNormAct2d(_Split, BatchNormAct2d):
    pass


_SPLIT = {
    nn.BatchNorm1d: SplitBatchNorm1d,
    nn.BatchNorm2d: SplitBatchNorm2d,
    BatchNormAct2d: SplitBatchNormAct2d,
}
