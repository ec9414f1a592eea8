"""Projection heads, from a backbone's features to the embedding, and prototypes, from the embedding
to scores.

The keys of their state dicts are those of the published checkpoints.
Shapes: F features, d embedding, P prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(dim: int, hidden: int, out: int, bn: bool = False) -> nn.Sequential | nn.Linear:
    """Linear-ReLU-Linear, the head of MoCo-v2 (arXiv:2003.04297): [...,dim] -> [...,out].

    hidden  width of the hidden layer; 0: a single Linear, as in MoCo-v1
    bn      Linear-BN-ReLU-Linear, the head of SwAV (arXiv:2006.09882)"""
    if not hidden:
        return nn.Linear(dim, out)
    norm = [nn.BatchNorm1d(hidden)] if bn else []
    return nn.Sequential(
        nn.Linear(dim, hidden), *norm, nn.ReLU(inplace=True), nn.Linear(hidden, out)
    )


def dino_mlp(
    dim: int, hidden: int = 2048, bottleneck: int = 256, bn: bool = False
) -> nn.Sequential | nn.Linear:
    """Linear-GELU-Linear-GELU-Linear: [...,dim] -> [...,bottleneck].  It is DINO's head up to its
    normalisation (arXiv:2104.14294, section 3.1).

    hidden  width of the two hidden layers; 0: a single Linear
    bn      a batch norm before each GELU
    Weights are drawn by DINO's rule: from a normal distribution of deviation 0.02, cut at +-2, and
    biases are 0."""
    layers: list[nn.Module] = []
    width = dim
    for _ in range(2 if hidden else 0):
        layers += [nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] if bn else []), nn.GELU()]
        width = hidden
    last = nn.Linear(width, bottleneck)
    # Only now that all are made: the order of random draws is part of what a seed means.
    for m in (*layers, last):
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
    return nn.Sequential(*layers, last) if hidden else last


class Prototypes(nn.Module):
    """Scores of embeddings, [...,d] -> [...,P]: their cosines to P prototypes.  Lengths are computed
    in float32 or wider, the products in the precision of an active autocast.

    This is SwAV's layer (arXiv:2006.09882): its rows have length 1 at every moment.  They begin so,
    an optimizer puts them back after each step that moves them (see engine.unit_rows), and rows of
    a file that have another length are scaled.  So an optimizer that looks at norms, as LARS,
    sees rows of length 1, and a gradient with its part along the row."""

    # The parameters whose rows keep length 1.
    unit_rows: tuple[str, ...] = ("weight",)

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        # Drawn by torch's initialisation of a linear layer, as in both papers' code.
        self.weight = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())
        _rows_to_length_1(self)
        self.register_load_state_dict_post_hook(_rows_to_length_1)

    def forward(self, z: Tensor) -> Tensor:
        """z need not be normalised."""
        return F.linear(_unit(z), self.weight)


class LastLayer(Prototypes):
    """DINO's last layer (arXiv:2104.14294), which is weight-normalised: its rows may have any length,
    and only their direction counts."""

    unit_rows = ()

    def __init__(self, dim: int, count: int, gain: bool = False) -> None:
        """gain  each output is multiplied by a trained number, which starts at 1 (DINO's
        norm_last_layer False)"""
        super().__init__(dim, count)
        # [P,1] as in DINO's code, whose optimizer decays it like every matrix.
        self.gain = nn.Parameter(torch.ones(count, 1)) if gain else None
        self.register_load_state_dict_pre_hook(_gain_to_a_column)

    def forward(self, z: Tensor) -> Tensor:
        """z need not be normalised."""
        scores = F.linear(_unit(z), F.normalize(self.weight, dim=1))
        return scores if self.gain is None else scores * self.gain.squeeze(1)


def _unit(z: Tensor) -> Tensor:
    """Rows of length 1, in float32 or wider."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


@torch.no_grad()
def _rows_to_length_1(prototypes: nn.Module, _: object = None) -> None:
    """Scales the rows of its `unit_rows`, in place: at the start, and after a state dict is loaded.

    Rows that have length 1 up to rounding stay as they are to the last bit, since a resumed run
    must not differ."""
    assert isinstance(prototypes, Prototypes)
    for name in prototypes.unit_rows:
        weight = prototypes.get_parameter(name)
        length = weight.norm(dim=1, keepdim=True)
        weight.div_(torch.where((length - 1).abs() < 1e-4, 1.0, length.clamp(min=1e-12)))


def _gain_to_a_column(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: object) -> None:
    """Checkpoints once had the gain as [P]."""
    gain = state.get(f"{prefix}gain")
    if gain is not None and gain.dim() == 1:
        state[f"{prefix}gain"] = gain[:, None]
