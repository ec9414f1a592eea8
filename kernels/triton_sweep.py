"""Triton kernels that read or write the queue: unit rows, the sweep, and the ring buffer.

Shapes: K rows of the queue, d = C their width, CP = C padded to a power of two, S ranges of the
queue, `rows` rows that meet it: one group of n, or the student's n and then the teacher's n.

Unit rows are made ahead of the sweep.  Done inside it, on sm_90 a block of 128 rows at 2 blocks a
multiprocessor spills 120 bytes a thread."""

import triton
import triton.language as tl
from fastdisco.kernels.triton_math import INTERPRET, cast, unit


@triton.jit(do_not_specialize=["n"])
def units_kernel(
    first,  # [n,C] raw rows
    second,  # [n,C] raw rows of the second group
    out,  # [rows,C] unit rows in the queue's dtype
    n,
    C: tl.constexpr,
    CP: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, CP)
    if row < n:
        x, _ = unit(first, row, C, cols)
    else:
        x, _ = unit(second, row - n, C, cols)
    tl.store(out + row * C + cols, cast(x, out.dtype.element_ty), mask=cols < C)


@triton.jit(do_not_specialize=["n", "rows", "k", "span"])
def moments_kernel(
    units,  # [rows,C]
    queue,  # [K,C]
    total,  # [S,rows] out: sum of exponentials
    top,  # [S,rows] out: the maximum that was subtracted; only if RUNNING
    mean,  # [S,rows,C] out: the queue's rows, weighted by their exponentials; only if MEAN
    n,
    rows,
    k,
    span,  # rows of the queue in a range
    c_first,  # log2(e) / temperature of the first group
    c_second,
    C: tl.constexpr,
    CP: tl.constexpr,
    ROWS: tl.constexpr,  # rows in a block
    KEYS: tl.constexpr,  # rows of the queue in a tile
    STAGES: tl.constexpr,  # tiles in flight
    RUNNING: tl.constexpr,  # look for each row's maximum, else take c
    MEAN: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches past the queue's end, and C == CP
    TMA: tl.constexpr,  # tiles come by the bulk copy engine
):
    """The sweep: a block of rows against a range of the queue a program, as in FlashAttention with
    the queue as keys and values (m_i, l_i and acc are named as there).  Logits are in base 2."""
    start, split = tl.program_id(1) * ROWS, tl.program_id(0)
    row, cols = tl.arange(0, ROWS), tl.arange(0, CP)
    here = (row < rows - start)[:, None] & (cols < C)[None, :]
    # Offsets within the block, in 32 bits.  A scalar adds the block's own offset, since 64-bit
    # addresses alone would fill the registers.
    at = row[:, None] * C + cols[None, :]
    # Loaded in the queue's dtype, so that the tensor cores read it from shared memory.
    x = tl.load(units + start.to(tl.int64) * C + at, mask=here, other=0.0)
    c = tl.where(row < n - start, c_first, c_second)
    kind = queue.dtype.element_ty
    if INTERPRET:
        x = x.to(tl.float32)
    if TMA:
        tiles = tl.make_tensor_descriptor(
            queue, shape=[k, C], strides=[C, 1], block_shape=[KEYS, CP]
        )
    # The maximum so far.  No cosine exceeds 1, so c itself bounds every logit.
    m_i = c
    if RUNNING:
        m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, CP], tl.float32)
    begin = split * span
    for j in tl.range(begin, tl.minimum(begin + span, k), KEYS, num_stages=STAGES):
        # ---- a tile [KEYS,CP] of the queue; int64, since K d passes 2^31
        key = j + tl.arange(0, KEYS)
        if TMA:
            tile = tiles.load([j, 0])
        elif EVEN:
            tile = tl.load(queue + key.to(tl.int64)[:, None] * C + cols[None, :])
        else:
            tile = tl.load(
                queue + key.to(tl.int64)[:, None] * C + cols[None, :],
                mask=(key < k)[:, None] & (cols < C)[None, :],
                other=0.0,
            )
        # The interpreter would multiply the bits of bfloat16 as whole numbers.
        if INTERPRET:
            tile = tile.to(tl.float32)
        # ---- logits [ROWS,KEYS] and the new maximum
        s = tl.dot(x, tl.trans(tile), input_precision="ieee") * c[:, None]
        if RUNNING:
            if not EVEN:
                s = tl.where((key < k)[None, :], s, float("-inf"))
            new = tl.maximum(m_i, tl.max(s, 1))
            shrink = tl.exp2(m_i - new)
            l_i *= shrink
            if MEAN:
                acc *= shrink[:, None]
            m_i = new
        # ---- the sums
        p = tl.exp2(s - m_i[:, None])
        if not EVEN:
            p = tl.where((key < k)[None, :], p, 0.0)
        l_i += tl.sum(p, 1)
        if MEAN:
            p = cast(p, kind)
            acc = tl.dot(p.to(tl.float32) if INTERPRET else p, tile, acc, input_precision="ieee")
    out = split.to(tl.int64) * rows + start  # in [S,rows]
    tl.store(total + out + row, l_i, mask=row < rows - start)
    if RUNNING:
        tl.store(top + out + row, m_i, mask=row < rows - start)
    if MEAN:
        tl.store(mean + out * C + at, acc, mask=here)


@triton.jit(do_not_specialize=["size"])
def enqueue_kernel(
    queue,  # [size,C]
    ptr,  # [] int64
    keys,  # [n,C] raw rows
    size,
    C: tl.constexpr,
    CP: tl.constexpr,
):
    """One key a program: its unit row over row (ptr + key) % size of the queue."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, CP)
    x, _ = unit(keys, row, C, cols)
    tl.store(
        queue + (tl.load(ptr) + row) % size * C + cols,
        cast(x, queue.dtype.element_ty),
        mask=cols < C,
    )


@triton.jit(do_not_specialize=["n", "size"])
def advance_kernel(ptr, n, size):
    """Moves the queue's pointer by n, in one program."""
    tl.store(ptr, (tl.load(ptr) + n) % size)
