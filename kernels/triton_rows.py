"""Triton kernels with one row a program: they add up what the sweep found in each range of the
queue, and compute the loss and its gradient.

Shapes: V views, B = n images, d = C width, CP = C padded to a power of two, S = splits ranges of
the queue; `rows` rows in the sweep.  total [S,rows], top [S,rows] and mean [S,rows,C] are as
triton_sweep.moments_kernel writes them.  `inverse` is 1 / temperature."""

import triton
import triton.language as tl
from fastdisco.kernels.triton_math import LOG2E, sigmoid, softplus, store_through_unit, unit


@triton.jit(do_not_specialize=["n", "splits"])
def moco_rows_kernel(
    z,  # [V,B,C] raw rows of the student
    k,  # [B,C] raw keys
    t,  # [V,B,C] raw rows of the teacher; not read if VIEWS is 0
    total,
    top,
    mean,
    terms,  # [2,B] out: contrast, distance to the teacher
    contrast,  # [B,C] out: gradient of the contrast to z[0]
    distill,  # [V,B,C] out: gradient of the distance to z
    n,
    splits,
    inverse,
    C: tl.constexpr,
    CP: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, at least splits
    GATHER: tl.constexpr,
    VIEWS: tl.constexpr,  # V, or 0 without a teacher
    RUNNING: tl.constexpr,
    GRAD: tl.constexpr,
):
    """MoCo's contrast of view 0, and DisCo's distance of all views; see chunked.moco."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, CP)
    q, length = unit(z, row, C, cols)
    key, _ = unit(k, row, C, cols)
    # The positive stays in float32, whatever the queue's dtype.
    own = tl.sum(q * key, 0)
    margin, negatives = gathered(
        total, top, mean, row, n, splits, own, inverse, cols, C, SPLITS, GATHER, RUNNING, GRAD
    )
    tl.store(terms + row, softplus(-margin))
    if GRAD:
        to_q = sigmoid(-margin) * (negatives - key) * (inverse / n)
        store_through_unit(contrast, row, to_q, q, length, C, cols)
    # ---- DisCo's distance; the loop is unrolled, and gone without a teacher
    apart = 0.0
    for v in tl.static_range(VIEWS):
        x, length = unit(z, v * n + row, C, cols)
        goal, _ = unit(t, v * n + row, C, cols)
        apart += tl.sum((x - goal) * (x - goal), 0)
        if GRAD:
            store_through_unit(distill, v * n + row, (x - goal) * (2.0 / n), x, length, C, cols)
    tl.store(terms + n + row, apart)


@triton.jit(do_not_specialize=["n", "splits_s", "splits_t"])
def seed_rows_kernel(
    zs,  # [B,C] raw rows of the student
    zt,  # [B,C] raw rows of the teacher
    total_s,
    top_s,
    mean_s,
    total_t,
    top_t,
    mean_t,
    loss,  # [B] out
    grad,  # [B,C] out: to zs
    n,
    splits_s,
    splits_t,
    inverse_s,
    inverse_t,
    C: tl.constexpr,
    CP: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, at least both splits
    GATHER: tl.constexpr,
    RUNNING: tl.constexpr,
    GRAD: tl.constexpr,
):
    """SEED's cross-entropy; see chunked.seed."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, CP)
    x, length = unit(zs, row, C, cols)
    t, _ = unit(zt, row, C, cols)
    own = tl.sum(x * t, 0)
    # With a gradient there was one sweep over both groups of rows, else one for each.
    if GRAD:
        rows, row_t = 2 * n, n + row
    else:
        rows, row_t = n, row
    margin, negatives = gathered(
        total_s,
        top_s,
        mean_s,
        row,
        rows,
        splits_s,
        own,
        inverse_s,
        cols,
        C,
        SPLITS,
        GATHER,
        RUNNING,
        GRAD,
    )
    # The teacher's cosine to its own feature is 1.
    margin_t, expected = gathered(
        total_t,
        top_t,
        mean_t,
        row_t,
        rows,
        splits_t,
        1.0,
        inverse_t,
        cols,
        C,
        SPLITS,
        GATHER,
        RUNNING,
        True,
    )
    b = sigmoid(-margin_t)
    tl.store(loss + row, softplus(-margin) + b * (own - tl.sum(x * expected, 0)) * inverse_s)
    if GRAD:
        to_x = (sigmoid(-margin) * (negatives - t) - b * (expected - t)) * (inverse_s / n)
        store_through_unit(grad, row, to_x, x, length, C, cols)


@triton.jit
def gathered(
    total,
    top,
    mean,
    row,
    rows,
    splits,
    own,  # cosine of the row to its own positive
    inverse,
    cols,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    GATHER: tl.constexpr,  # ranges whose mean rows are read at a time
    RUNNING: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Returns log of exp(own / temp) over the queue's sum of exponentials, and the softmax mean of
    the queue's rows (0 unless MEAN)."""
    # ---- the sum over all ranges, brought to the largest of their maxima
    c = LOG2E * inverse
    s = tl.arange(0, SPLITS)
    l_i = tl.load(total + s * rows + row, mask=s < splits, other=0.0)
    best = 0.0
    if RUNNING:
        m_i = tl.load(top + s * rows + row, mask=s < splits, other=float("-inf"))
        best = tl.max(m_i, 0)
        l_i *= tl.exp2(m_i - best)
        exponent = own * c - best
    else:
        exponent = (own - 1.0) * c
    l_i = tl.sum(l_i, 0)
    # ---- the mean row, some ranges at a time
    acc = own * 0 * cols
    if MEAN:
        for i in tl.range(0, splits, GATHER):
            few = i + tl.arange(0, GATHER)
            part = tl.load(
                mean + (few.to(tl.int64) * rows + row)[:, None] * C + cols[None, :],
                mask=(few < splits)[:, None] & (cols < C)[None, :],
                other=0.0,
            )
            if RUNNING:
                m_few = tl.load(top + few * rows + row, mask=few < splits, other=float("-inf"))
                part *= tl.exp2(m_few - best)[:, None]
            acc += tl.sum(part, 0)
        # The sum is 0 where a teacher at a low temperature sees its own feature alone.
        acc /= tl.maximum(l_i, 1.2e-38)
    return (exponent - tl.log2(l_i)) / LOG2E, acc
