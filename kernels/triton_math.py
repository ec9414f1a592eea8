"""What the Triton kernels share: unit rows, rounding, and functions to float32's precision.

C is the width d of a row, `cols` the columns 0..CP-1 of a row padded to a power of two."""

import math

import triton
import triton.language as tl
from fastdisco.kernels import reference

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
EPS = tl.constexpr(reference.EPS)
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def unit(rows, row, C: tl.constexpr, cols):
    """Row `row` of rows [.,C] scaled to length 1, float32, and its length."""
    x = tl.load(rows + row * C + cols, mask=cols < C, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 0)), EPS)
    return x / length, length


@triton.jit
def store_through_unit(out, row, grad, x, length, C: tl.constexpr, cols):
    """Stores the gradient to a raw row of that length, from the gradient to its unit row x."""
    tl.store(out + row * C + cols, (grad - tl.sum(grad * x, 0) * x) / length, mask=cols < C)


@triton.jit
def cast(x, kind: tl.constexpr):
    """float32 to `kind`, rounded to nearest."""
    # The interpreter's own cast to bfloat16 truncates.
    if INTERPRET and kind == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def softplus(x):
    """log(1 + e^x) to float32's relative precision, which the hardware's logarithm lacks near 1."""
    # log(1 + u) = 2 artanh(r) with r <= 1/3, as a series in r^2.
    u = tl.exp(-tl.abs(x))
    r = u / (2 + u)
    r2 = r * r
    series = 1 + r2 * (
        1 / 3
        + r2 * (1 / 5 + r2 * (1 / 7 + r2 * (1 / 9 + r2 * (1 / 11 + r2 * (1 / 13 + r2 * (1 / 15))))))
    )
    return tl.maximum(x, 0.0) + 2 * r * series


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    u = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, u) / (1 + u)
