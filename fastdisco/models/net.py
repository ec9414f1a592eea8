"""Networks: a timm backbone with a projection head and prototypes, split batch norm, the mean
student, and strict loading of weights."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Out(NamedTuple):
    z: Tensor  # [V,B,d] raw head outputs: the losses normalise them
    scores: Tensor | None = None  # [V,B,P] cosines to the prototypes, of nets that have them


class Net(nn.Module):
    """Backbone, head and prototypes; a list of views [B,3,S,S] in, Out.z [V,B,d] and Out.scores
    [V,B,P] out."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        prototypes: nn.Module | None = None,
        joint: bool = False,
    ):
        """joint: in training, too, the backbone runs once per resolution and the head once, so that
        batch-norm statistics are of all those views (SwAV, DINO); else once per view (MoCo).  In
        eval mode it always does."""
        super().__init__()
        self.backbone, self.head, self.prototypes, self.joint = backbone, head, prototypes, joint
        self.groups = 1  # of images in a joint forward, see `split_bn`

    def forward(self, views: list[Tensor]) -> Out:
        if self.training and not self.joint:
            z = torch.stack([self.head(self.features(v)) for v in views])
        else:
            z = self._jointly(views, self.groups if self.training else 1)
        return Out(z, None if self.prototypes is None else self.prototypes(z))

    def _jointly(self, views: list[Tensor], groups: int) -> Tensor:
        """[V,B,d].  Group after group of images, with all their views, so that the slices of a
        split batch norm hold what a rank would."""
        sizes = {}
        for i, v in enumerate(views):
            sizes.setdefault(v.shape[-2:], []).append(i)
        parts = [v.chunk(groups) for v in views]
        found = [
            self.features(torch.cat([parts[i][g] for g in range(groups) for i in same])).unflatten(
                0, (groups, len(same), -1)
            )
            for same in sizes.values()
        ]  # [G,views of one size,B/G,F]
        z = (
            self.head(torch.cat(found, 1).flatten(0, 2))
            .unflatten(0, (groups, len(views), -1))
            .transpose(0, 1)
            .flatten(1, 2)
        )
        place = {i: at for at, i in enumerate(i for same in sizes.values() for i in same)}
        return (
            z
            if list(place) == sorted(place)
            else torch.stack([z[place[i]] for i in range(len(views))])
        )

    def features(self, x: Tensor) -> Tensor:
        """[B,3,S,S] -> [B,F], the pooled output of the backbone: what evaluations use."""
        return self.backbone(x)


def size(net: nn.Module) -> int:
    """Number of weights, those of buffers not among them."""
    return sum(p.numel() for p in net.parameters())
