"""A backbone with a projection head and, for some methods, prototypes.

Shapes: V views, B images on this rank, S side of an image, F features, d embedding, P prototypes,
G groups of images."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastdisco.common import precision


class Out(NamedTuple):
    """What a network gives for the views of a batch."""

    # [V,B,d] raw outputs of the head.  The losses normalise them.
    z: Tensor
    # [V,B,P] cosines to the prototypes; None for networks without.
    scores: Tensor | None = None


class Net(nn.Module):
    """Backbone, head and prototypes: a list of V views [B,3,S,S] -> Out."""

    backbone: nn.Module
    head: nn.Module
    prototypes: nn.Module | None
    joint: bool
    # In training, groups of images whose batch-norm statistics are their own; see `split_bn`.
    groups: int

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        prototypes: nn.Module | None = None,
        joint: bool = False,
    ) -> None:
        """joint  in training, run the backbone once per resolution and the head once, so that
        batch-norm statistics are of all those views (SwAV, DINO); otherwise both run once per view
        (MoCo).  In eval mode the network always runs jointly, where it makes no difference."""
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.prototypes = prototypes
        self.joint = joint
        self.groups = 1

    def forward(self, views: list[Tensor]) -> Out:
        with precision.in_network():
            if self.training and not self.joint:
                z = torch.stack([self.head(self.features(view)) for view in views])
            else:
                z = self._jointly(views, self.groups if self.training else 1)
            scores = None if self.prototypes is None else precision.of_network(self.prototypes(z))
        return Out(precision.of_network(z), scores)

    def features(self, x: Tensor) -> Tensor:
        """[B,3,S,S] -> [B,F], the pooled output of the backbone, which evaluations use."""
        return self.backbone(x)

    def _jointly(self, views: list[Tensor], groups: int) -> Tensor:
        """[V,B,d], by one forward of the backbone per resolution and one of the head.

        The batches hold the first group of images with all its views, then the second, and so on:
        a slice of a split batch norm then has exactly the rows that a GPU of its own would have."""
        same_size: dict[torch.Size, list[int]] = {}
        for i, view in enumerate(views):
            same_size.setdefault(view.shape[-2:], []).append(i)
        parts = [view.chunk(groups) for view in views]
        # [G,views of one size,B/G,F] for each size.
        found = []
        for same in same_size.values():
            batch = torch.cat([parts[i][g] for g in range(groups) for i in same])
            found.append(self.features(batch).unflatten(0, (groups, len(same), -1)))
        # [G*V*B/G,d] -> [G,V,B/G,d] -> [V,B,d], views of a size beside each other.
        z = self.head(torch.cat(found, 1).flatten(0, 2))
        z = z.unflatten(0, (groups, len(views), -1)).transpose(0, 1).flatten(1, 2)
        order = [i for same in same_size.values() for i in same]
        if order == sorted(order):
            return z
        return torch.stack([z[order.index(i)] for i in range(len(views))])


def size(net: nn.Module) -> int:
    """The number of the network's weights.  Buffers do not count."""
    return sum(p.numel() for p in net.parameters())


def macs(backbone: nn.Module, image: int) -> int:
    """Multiplications with an addition in one forward of one image of `image` pixels: half of what
    torch.utils.flop_counter finds for convolutions and matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, image, image))
    return counter.get_total_flops() // 2
