"""Batch norm over the batches of all ranks, without a wait for the device.

torch.nn.SyncBatchNorm lets the host wait three times in each norm, since ranks may have batches of
different sizes there.  Here all ranks have the same, so one exchange of means and variances in the
forward and one of two sums in the backward do, and nothing is read by the host.

Shapes: B images on this rank, C channels, n = B x height x width elements of a channel on this rank,
R ranks.  Batch normalisation: arXiv:1502.03167, algorithm 1, with the batch of all ranks as batch."""

from typing import Any

import torch
import torch.distributed as td
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdisco.common import dist


class Synced(_BatchNorm):
    """The forward of a synchronised batch norm; the class beside it says which one it was."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or dist.world() == 1:
            return super().forward(input)
        y, mean, var = _Norm.apply(input, self.weight, self.bias, self.eps)
        self._track(mean, var, input.numel() // input.shape[1] * dist.world())
        # timm's class normalises, drops and activates in one forward.
        return self.act(self.drop(y)) if isinstance(self, BatchNormAct2d) else y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, n: int) -> None:
        """Moves the running statistics by those of n elements a channel, the variance unbiased."""
        running, spread, batches = self.running_mean, self.running_var, self.num_batches_tracked
        # Made with track_running_stats=False it has none of the three.
        if running is None or spread is None or batches is None:
            return
        batches.add_(1)
        share = 1 / batches.float() if self.momentum is None else self.momentum
        running.lerp_(mean.to(running), share)
        spread.lerp_((var * (n / max(n - 1, 1))).to(spread), share)


class SyncedBatchNorm1d(Synced, nn.BatchNorm1d):
    pass


class SyncedBatchNorm2d(Synced, nn.BatchNorm2d):
    pass


# timm calls the forward's argument x where torch has input; it is passed by position.
# pyrefly: ignore[inconsistent-inheritance]
class SyncedBatchNormAct2d(Synced, BatchNormAct2d):
    pass


SYNCED: dict[type[nn.Module], type[Synced]] = {
    nn.BatchNorm1d: SyncedBatchNorm1d,
    nn.BatchNorm2d: SyncedBatchNorm2d,
    BatchNormAct2d: SyncedBatchNormAct2d,
}


class _Norm(torch.autograd.Function):
    """(x [B,C,...], weight [C], bias [C]) -> (y as x, mean [C], biased variance [C]); the statistics
    are of all ranks, in float32 at least, and have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        own_var, own_mean = torch.var_mean(x.to(wide), _others(x), correction=0)
        # One exchange: [R,2,C].
        every = dist.all_gather(torch.stack([own_mean, own_var])[None])
        means, variances = every[:, 0], every[:, 1]
        mean = means.mean(0)
        # The variance of equal parts: the mean of theirs, and the variance of their means.
        var = variances.mean(0) + (means - mean).square().mean(0)
        scale = torch.rsqrt(var + eps)
        gain = scale if weight is None else scale * weight
        shift = -mean * gain if bias is None else bias - mean * gain
        y = torch.addcmul(_along(shift, x), x.to(wide), _along(gain, x)).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.biased = bias is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dy = grads[0].to(mean.dtype)
        unit = (x.to(mean.dtype) - _along(mean, x)) * _along(scale, x)
        sums = torch.stack([dy.sum(_others(x)), (dy * unit).sum(_others(x))])
        own = sums.clone()
        # One exchange: [2,C].  As the statistics, the sums are of all ranks' elements.
        td.all_reduce(sums)
        n = x.numel() // x.shape[1] * dist.world()
        gain = scale if weight is None else scale * weight
        dx = dy - _along(sums[0] / n, x) - unit * _along(sums[1] / n, x)
        dx = (dx * _along(gain, x)).to(x.dtype)
        # Of the weights each rank has its own: the engine averages gradients over ranks.
        dweight = None if weight is None else own[1].to(weight.dtype)
        return dx, dweight, own[0].to(mean.dtype) if ctx.biased else None, None


def _others(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, x.ndim)]


def _along(c: Tensor, x: Tensor) -> Tensor:
    """[C] -> the shape that broadcasts over x [B,C,...]."""
    return c.view(-1, *[1] * (x.ndim - 2))
