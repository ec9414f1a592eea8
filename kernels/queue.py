"""The queue losses in Triton: one kernel sweeps the queue, shared by MoCo and SEED, and one a loss
gathers what it found; no B x K matrix.

  _units     unit rows in the queue's dtype
  _moments   a block of rows and a range of the queue per program: sum of exponentials, and
             softmax-weighted sum of the queue's rows
  _moco_rows, _seed_rows   a row per program: adds the ranges up, loss and gradient to the raw row
  _enqueue, _advance   unit rows into the ring, and its pointer on

The raw rows are made unit rows ahead of the sweep: done in it, on sm_90 a block of 128 rows at 2
blocks a multiprocessor spills 120 bytes a thread.

Nothing is added atomically, so results repeat bit for bit.  Nothing waits for the device and all
scratch is torch's, so CUDA graphs capture it."""

import math

import torch
import triton
import triton.language as tl
from fastdisco.kernels import launch, reference
from fastdisco.kernels.chunked import fixed_maximum
from torch import Tensor

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
EPS = tl.constexpr(reference.EPS)
LOG2E = tl.constexpr(math.log2(math.e))
OPTIONS = dict(enable_fp_fusion=True)  # triton 3.10 turns it off unless asked
# Rows of a queue whose copy in float32 costs nothing, while the rounding of so few weights would
# not average out.
SHORT = 256
GATHER = 32  # ranges that a row's program reads at a time


def moco(
    z: Tensor, k: Tensor, t: Tensor | None, queue: Tensor, temp: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.moco: losses [2] and gradients [B,d] and [V,B,d], all float32."""
    z, k = z.contiguous(), k.contiguous()
    views, n, d = z.shape
    new = lambda *shape: z.new_empty(shape, dtype=torch.float32)
    found = moments([(z[0], temp)], queue, differentiate, fixed_maximum(temp, own=False))
    terms = new(2, n)
    contrast = new(n, d) if differentiate else new(0)
    distill = new(views, n, d) if differentiate and t is not None else new(0)
    _moco_rows[n,](
        z,
        k,
        z if t is None else t.contiguous(),
        *found,
        terms,
        contrast,
        distill,
        n,
        len(found[0]),
        1 / temp,
        C=d,
        VIEWS=views if t is not None else 0,
        GRAD=differentiate,
        **_gather(found, d),
    )
    return terms.mean(1), contrast, distill


def seed(
    zs: Tensor, zt: Tensor, queue: Tensor, temp_s: float, temp_t: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """See ops.seed: the loss and its gradient [B,d], float32."""
    zs, zt = zs.contiguous(), zt.contiguous()
    n, d = zs.shape
    fixed = fixed_maximum(temp_s, own=False) and fixed_maximum(temp_t, own=True)
    if differentiate:
        student = teacher = moments([(zs, temp_s), (zt, temp_t)], queue, True, fixed)
    else:  # of the student only the sum is needed
        student, teacher = (
            moments([(zs, temp_s)], queue, False, fixed),
            moments([(zt, temp_t)], queue, True, fixed),
        )
    loss = zs.new_empty(n, dtype=torch.float32)
    grad = zs.new_empty((n, d) if differentiate else 0, dtype=torch.float32)
    _seed_rows[n,](
        zs,
        zt,
        *student,
        *teacher,
        loss,
        grad,
        n,
        len(student[0]),
        len(teacher[0]),
        1 / temp_s,
        1 / temp_t,
        C=d,
        GRAD=differentiate,
        **_gather(student, d, len(teacher[0])),
    )
    return loss.mean(), grad


def enqueue(queue: Tensor, ptr: Tensor, keys: Tensor):
    """See ops.enqueue."""
    d = keys.shape[1]
    if len(keys):
        _enqueue[len(keys),](
            queue,
            ptr,
            keys.contiguous(),
            len(queue),
            C=d,
            CP=launch.padded(d),
            num_warps=1,
            **OPTIONS,
        )
        # When the rows are written, for each of them reads it.
        _advance[1,](ptr, len(keys), len(queue), num_warps=1)


def moments(
    groups: list[tuple[Tensor, float]], queue: Tensor, want_mean: bool, fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One sweep of the queue for one or two groups of raw rows ([N,d], temp).

    Returns per range of the queue, of which there are S, and per row, the second group's N after
    the first's:
    sum_j 2^(c s_j - top) [S,rows], top [S,rows] (empty with the fixed maximum c), sum_j 2^(c s_j -
    top) queue_j [S,rows,d] (empty unless wanted); c = log2(e) / temp and s_j the cosine to the
    queue's row j.  float32."""
    (first, temp), (second, temp_2) = groups[0], groups[-1]
    n, d = first.shape
    rows, k = n * len(groups), len(queue)
    if k <= SHORT:
        queue = queue.float()
    # Relative to 1 / temp most of float16's weights would be denormal.
    running = not fixed or queue.dtype == torch.float16
    how = launch.choose(queue.device, queue.dtype, d, rows, running)
    blocks = triton.cdiv(rows, how.rows)
    splits = max(1, launch.multiprocessors(queue.device) * how.ctas // blocks)
    # Of the queue's rows, per range.
    span = triton.cdiv(triton.cdiv(k, how.keys), splits) * how.keys
    splits = triton.cdiv(k, span)
    units = queue.new_empty(rows, d)
    _units[rows,](first, second, units, n, C=d, CP=launch.padded(d), num_warps=1, **OPTIONS)
    new = lambda *shape: queue.new_empty(shape, dtype=torch.float32)
    total, top, mean = (
        new(splits, rows),
        new(splits, rows) if running else new(0),
        new(splits, rows, d) if want_mean else new(0),
    )
    if how.tma:  # descriptors made in the kernel live in scratch memory of the launch
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=queue.device)
        )
    _moments[splits, blocks](
        units,
        queue,
        total,
        top,
        mean,
        n,
        rows,
        k,
        span,
        LOG2E.value / temp,
        LOG2E.value / temp_2,
        **sweep(how, d, k, running, want_mean),
    )
    return total, top, mean


def sweep(how: launch.Launch, d: int, k: int, running: bool, want_mean: bool) -> dict:
    """Compile-time arguments and options of `_moments`."""
    even = k % how.keys == 0 and d == launch.padded(d)
    return (
        dict(
            C=d,
            CP=launch.padded(d),
            ROWS=how.rows,
            KEYS=how.keys,
            STAGES=how.stages,
            RUNNING=running,
            MEAN=want_mean,
            EVEN=even,
            TMA=how.tma,
        )
        | how.options(even)
        | OPTIONS
    )


def _gather(found: tuple[Tensor, Tensor, Tensor], d: int, splits: int = 1) -> dict:
    """Compile-time arguments of a row's program."""
    splits = max(splits, len(found[0]))
    return dict(
        CP=launch.padded(d),
        SPLITS=max(GATHER, triton.next_power_of_2(splits)),
        GATHER=GATHER,
        RUNNING=found[1].numel() > 0,
        num_warps=4,
        **OPTIONS,
    )


@triton.jit(do_not_specialize=["n"])
def _units(first, second, out, n, C: tl.constexpr, CP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, CP)
    if row < n:
        x, _ = _unit(first, row, C, cols)
    else:
        x, _ = _unit(second, row - n, C, cols)
    tl.store(out + row * C + cols, _cast(x, out.dtype.element_ty), mask=cols < C)


@triton.jit(do_not_specialize=["n", "rows", "k", "span"])
def _moments(
    units,
    queue,
    total,
    top,
    mean,
    n,
    rows,
    k,
    span,
    c_first,
    c_second,
    C: tl.constexpr,
    CP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    RUNNING: tl.constexpr,
    MEAN: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    start, split = tl.program_id(1) * ROWS, tl.program_id(0)
    row, cols = tl.arange(0, ROWS), tl.arange(0, CP)
    here = (row < rows - start)[:, None] & (cols < C)[None, :]
    # Within the block; a scalar holds the rest, for addresses alone would fill the registers.
    at = row[:, None] * C + cols[None, :]
    # As it is, so that the tensor cores read it from shared memory.
    x = tl.load(units + start.to(tl.int64) * C + at, mask=here, other=0.0)
    c = tl.where(row < n - start, c_first, c_second)
    kind = queue.dtype.element_ty
    if INTERPRET:
        x = x.to(tl.float32)
    if TMA:
        tiles = tl.make_tensor_descriptor(
            queue, shape=[k, C], strides=[C, 1], block_shape=[KEYS, CP]
        )
    m = c  # the maximum so far, or for ever
    if RUNNING:
        m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, CP], tl.float32)
    begin = split * span
    for j in tl.range(begin, tl.minimum(begin + span, k), KEYS, num_stages=STAGES):
        key = j + tl.arange(0, KEYS)
        if TMA:
            tile = tiles.load([j, 0])
        elif EVEN:
            tile = tl.load(queue + key.to(tl.int64)[:, None] * C + cols[None, :])  # K d passes 2^31
        else:
            tile = tl.load(
                queue + key.to(tl.int64)[:, None] * C + cols[None, :],
                mask=(key < k)[:, None] & (cols < C)[None, :],
                other=0.0,
            )
        if INTERPRET:  # it would multiply a bfloat16's bits
            tile = tile.to(tl.float32)
        s = tl.dot(x, tl.trans(tile), input_precision="ieee") * c[:, None]
        if RUNNING:
            if not EVEN:
                s = tl.where((key < k)[None, :], s, float("-inf"))
            new = tl.maximum(m, tl.max(s, 1))
            shrink = tl.exp2(m - new)
            l *= shrink
            if MEAN:
                acc *= shrink[:, None]
            m = new
        p = tl.exp2(s - m[:, None])
        if not EVEN:
            p = tl.where((key < k)[None, :], p, 0.0)
        l += tl.sum(p, 1)
        if MEAN:
            p = _cast(p, kind)
            acc = tl.dot(p.to(tl.float32) if INTERPRET else p, tile, acc, input_precision="ieee")
    out = split.to(tl.int64) * rows + start  # in [S,rows]
    tl.store(total + out + row, l, mask=row < rows - start)
    if RUNNING:
        tl.store(top + out + row, m, mask=row < rows - start)
    if MEAN:
        tl.store(mean + out * C + at, acc, mask=here)


@triton.jit(do_not_specialize=["n", "splits"])
def _moco_rows(
    z,
    k,
    t,
    total,
    top,
    mean,
    terms,
    contrast,
    distill,
    n,
    splits,
    inverse,
    C: tl.constexpr,
    CP: tl.constexpr,
    SPLITS: tl.constexpr,
    GATHER: tl.constexpr,
    VIEWS: tl.constexpr,
    RUNNING: tl.constexpr,
    GRAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, CP)
    q, length = _unit(z, row, C, cols)
    key, _ = _unit(k, row, C, cols)
    margin, negatives = _gathered(
        total,
        top,
        mean,
        row,
        n,
        splits,
        tl.sum(q * key, 0),
        inverse,
        cols,
        C,
        SPLITS,
        GATHER,
        RUNNING,
        GRAD,
    )
    tl.store(terms + row, _softplus(-margin))
    if GRAD:
        _store_through_unit(
            contrast, row, _sigmoid(-margin) * (negatives - key) * (inverse / n), q, length, C, cols
        )
    apart = 0.0
    for v in tl.static_range(VIEWS):
        x, length = _unit(z, v * n + row, C, cols)
        goal, _ = _unit(t, v * n + row, C, cols)
        apart += tl.sum((x - goal) * (x - goal), 0)
        if GRAD:
            _store_through_unit(distill, v * n + row, (x - goal) * (2.0 / n), x, length, C, cols)
    tl.store(terms + n + row, apart)


@triton.jit(do_not_specialize=["n", "splits_s", "splits_t"])
def _seed_rows(
    zs,
    zt,
    total_s,
    top_s,
    mean_s,
    total_t,
    top_t,
    mean_t,
    loss,
    grad,
    n,
    splits_s,
    splits_t,
    inverse_s,
    inverse_t,
    C: tl.constexpr,
    CP: tl.constexpr,
    SPLITS: tl.constexpr,
    GATHER: tl.constexpr,
    RUNNING: tl.constexpr,
    GRAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, CP)
    x, length = _unit(zs, row, C, cols)
    t, _ = _unit(zt, row, C, cols)
    own = tl.sum(x * t, 0)
    if GRAD:  # one sweep over both groups of rows, else one for each
        rows, of_teacher = 2 * n, n + row
    else:
        rows, of_teacher = n, row
    margin, negatives = _gathered(
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
    margin_t, expected = _gathered(
        total_t,
        top_t,
        mean_t,
        of_teacher,
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
    b = _sigmoid(-margin_t)
    tl.store(loss + row, _softplus(-margin) + b * (own - tl.sum(x * expected, 0)) * inverse_s)
    if GRAD:
        _store_through_unit(
            grad,
            row,
            (_sigmoid(-margin) * (negatives - t) - b * (expected - t)) * (inverse_s / n),
            x,
            length,
            C,
            cols,
        )


@triton.jit(do_not_specialize=["size"])
def _enqueue(queue, ptr, keys, size, C: tl.constexpr, CP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, CP)
    x, _ = _unit(keys, row, C, cols)
    tl.store(
        queue + (tl.load(ptr) + row) % size * C + cols,
        _cast(x, queue.dtype.element_ty),
        mask=cols < C,
    )


@triton.jit(do_not_specialize=["n", "size"])
def _advance(ptr, n, size):
    tl.store(ptr, (tl.load(ptr) + n) % size)


@triton.jit
def _cast(x, kind: tl.constexpr):
    """float32 to `kind`, rounded to nearest."""
    if INTERPRET and kind == tl.bfloat16:  # it truncates
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def _unit(rows, row, C: tl.constexpr, cols):
    """Row `row` at length 1, and its length."""
    x = tl.load(rows + row * C + cols, mask=cols < C, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 0)), EPS)
    return x / length, length


@triton.jit
def _store_through_unit(out, row, grad, x, length, C: tl.constexpr, cols):
    """The gradient to a raw row of one to its unit row x."""
    tl.store(out + row * C + cols, (grad - tl.sum(grad * x, 0) * x) / length, mask=cols < C)


@triton.jit
def _gathered(
    total,
    top,
    mean,
    row,
    rows,
    splits,
    own,
    inverse,
    cols,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    GATHER: tl.constexpr,
    RUNNING: tl.constexpr,
    MEAN: tl.constexpr,
):
    """log of exp(own / temp) over the negatives' sum of exponentials, and the softmax mean of the
    negatives."""
    c = LOG2E * inverse
    s = tl.arange(0, SPLITS)
    l = tl.load(total + s * rows + row, mask=s < splits, other=0.0)
    best = 0.0
    if RUNNING:
        m = tl.load(top + s * rows + row, mask=s < splits, other=float("-inf"))
        best = tl.max(m, 0)
        l *= tl.exp2(m - best)
        exponent = own * c - best
    else:
        exponent = (own - 1.0) * c
    l = tl.sum(l, 0)
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
                part *= tl.exp2(
                    tl.load(top + few * rows + row, mask=few < splits, other=float("-inf")) - best
                )[:, None]
            acc += tl.sum(part, 0)
        # L is 0 where a teacher at a low temperature sees its own feature alone.
        acc /= tl.maximum(l, 1.2e-38)
    return (exponent - tl.log2(l)) / LOG2E, acc


@triton.jit
def _softplus(x):
    """log(1 + e^x), to float32's relative precision; the hardware's logarithm has none near 1."""
    u = tl.exp(-tl.abs(x))
    r = u / (2 + u)  # log(1 + u) = 2 artanh(r); r <= 1/3
    r2 = r * r
    series = 1 + r2 * (
        1 / 3
        + r2 * (1 / 5 + r2 * (1 / 7 + r2 * (1 / 9 + r2 * (1 / 11 + r2 * (1 / 13 + r2 * (1 / 15))))))
    )
    return tl.maximum(x, 0.0) + 2 * r * series


@triton.jit
def _sigmoid(x):
    u = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, u) / (1 + u)
