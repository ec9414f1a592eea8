"""Softmax shares that matrix products on a CPU take at full speed."""

from torch import Tensor

# Nothing beside the 1 that the shares of a row sum to, and far above 1e-38, below which a float32 is
# denormal.  A CPU multiplies denormal numbers up to 150 times more slowly, and confident heads on
# many classes have mostly such shares.
LEAST = 1e-26


def normal_(p: Tensor) -> Tensor:
    """Shares p of any shape, in place: what is smaller becomes 1e-26."""
    return p.clamp_min_(LEAST)
