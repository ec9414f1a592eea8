"""The queue losses in Triton: how their kernels are launched.

One sweep of the queue serves MoCo and SEED; then a kernel for each loss gathers what the sweep
found.  The B x K logits never exist.  In the order of the launches:

  units_kernel                         unit rows in the queue's dtype
  moments_kernel                       a block of rows and a range of the queue a program: sum of
                                       exponentials, and softmax-weighted sum of the queue's rows
  moco_rows_kernel, seed_rows_kernel   a row a program: adds the ranges up; loss, and gradient to
                                       the raw row
  enqueue_kernel, advance_kernel       unit rows into the ring buffer, and its pointer on

Nothing is added atomically, so results repeat bit for bit.  Nothing waits for the device and all
scratch memory is torch's, so CUDA graphs capture it.

Shapes: V views, B = n images, d width, K rows of the queue, S ranges into which it is split, R rows
of one sweep: B, or 2 B with student and teacher stacked."""

import functools
import math
from typing import Any

import torch
import triton
from fastdisco.kernels import launch
from fastdisco.kernels.chunked import fixed_maximum
from fastdisco.kernels.triton_rows import moco_rows_kernel, seed_rows_kernel
from fastdisco.kernels.triton_sweep import (
    advance_kernel,
    enqueue_kernel,
    moments_kernel,
    units_kernel,
)
from torch import Tensor

LOG2E = math.log2(math.e)
OPTIONS = dict(enable_fp_fusion=True)  # Triton 3.10 turns it off unless asked
# A queue of up to so many rows is read in float32: its copy costs nothing, while the rounding of so
# few weights would not average out.
SHORT = 256
GATHER = 32  # ranges whose sums a row's program reads at a time


def moco(
    z: Tensor, k: Tensor, t: Tensor | None, queue: Tensor, temp: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.moco: losses [2] and gradients [B,d] and [V,B,d], all float32."""
    z, k = z.contiguous(), k.contiguous()
    views, n, d = z.shape
    found = moments([(z[0], temp)], queue, differentiate, fixed_maximum(temp, own=False))
    terms = _new(z, 2, n)
    contrast = _new(z, n, d) if differentiate else _new(z, 0)
    distill = _new(z, views, n, d) if differentiate and t is not None else _new(z, 0)
    moco_rows_kernel[n,](
        z,
        k,
        # Without a teacher any pointer will do: VIEWS is 0 and it is not read.
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
    else:
        # Without a gradient the student needs no mean row, so it is swept alone.
        student = moments([(zs, temp_s)], queue, False, fixed)
        teacher = moments([(zt, temp_t)], queue, True, fixed)
    loss = _new(zs, n)
    grad = _new(zs, n, d) if differentiate else _new(zs, 0)
    seed_rows_kernel[n,](
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


def enqueue(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    """See ops.enqueue."""
    n, d = keys.shape
    if not n:
        return
    constants = dict(C=d, CP=launch.padded(d))
    enqueue_kernel[n,](
        queue, ptr, keys.contiguous(), len(queue), **constants, num_warps=1, **OPTIONS
    )
    # A launch of its own: every program of the first reads the pointer.
    advance_kernel[1,](ptr, n, len(queue), num_warps=1)


def moments(
    groups: list[tuple[Tensor, float]], queue: Tensor, want_mean: bool, fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One sweep of the queue for one or two groups of raw rows, each ([B,d], temperature).

    The second group's rows follow the first's.  With c = log2(e) / temperature and s_j the cosine
    of a row to the queue's row j, returns in float32, for each range of the queue and each row:
      total  sum_j 2^(c s_j - top), [S,R]
      top    [S,R], empty where the maximum is fixed at c
      mean   sum_j 2^(c s_j - top) queue_j, [S,R,d], empty unless wanted"""
    (first, temp), (second, temp_2) = groups[0], groups[-1]
    n, d = first.shape
    rows = n * len(groups)
    if len(queue) <= SHORT:
        queue = queue.float()
    # Relative to 1 / temp most of float16's weights would be denormal.
    running = not fixed or queue.dtype == torch.float16
    how = launch.choose(queue.device, queue.dtype, d, rows, running)
    blocks = triton.cdiv(rows, how.rows)
    span, splits = _ranges(queue, how, blocks)

    total = _new(queue, splits, rows)
    top = _new(queue, splits, rows) if running else _new(queue, 0)
    mean = _new(queue, splits, rows, d) if want_mean else _new(queue, 0)
    if how.tma:
        # Descriptors made in the kernel live in scratch memory of the launch.
        triton.set_allocator(functools.partial(_scratch, queue.device))
    moments_kernel[splits, blocks](
        _units(first, second, rows, queue),
        queue,
        total,
        top,
        mean,
        n,
        rows,
        len(queue),
        span,
        LOG2E / temp,
        LOG2E / temp_2,
        **sweep(how, d, len(queue), running, want_mean),
    )
    return total, top, mean


def sweep(
    how: launch.Launch, d: int, k: int, running: bool, want_mean: bool
) -> dict[str, int | bool]:
    """Compile-time arguments and options of `moments_kernel`; k: rows of the queue."""
    even = k % how.keys == 0 and d == launch.padded(d)
    constants = dict(
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
    return constants | how.options(even) | OPTIONS


def _units(first: Tensor, second: Tensor, rows: int, queue: Tensor) -> Tensor:
    """[R,d] unit rows in the queue's dtype, of the first group and, with twice its rows, of the
    second."""
    n, d = first.shape
    units = queue.new_empty(rows, d)
    constants = dict(C=d, CP=launch.padded(d))
    units_kernel[rows,](first, second, units, n, **constants, num_warps=1, **OPTIONS)
    return units


def _ranges(queue: Tensor, how: launch.Launch, blocks: int) -> tuple[int, int]:
    """(rows of the queue in a range, number of ranges): whole tiles, and as many ranges as fill the
    GPU with blocks x ranges programs."""
    # One wave of programs: those of a second would wait for the first to end.
    wanted = max(1, launch.multiprocessors(queue.device) * how.ctas // blocks)
    span = triton.cdiv(triton.cdiv(len(queue), how.keys), wanted) * how.keys
    return span, triton.cdiv(len(queue), span)


def _gather(found: tuple[Tensor, Tensor, Tensor], d: int, splits: int = 1) -> dict[str, Any]:
    """Compile-time arguments and options of a row's program; splits: ranges of a second sweep."""
    splits = max(splits, len(found[0]))
    return dict(
        CP=launch.padded(d),
        SPLITS=max(GATHER, triton.next_power_of_2(splits)),
        GATHER=GATHER,
        RUNNING=found[1].numel() > 0,
        num_warps=4,
        **OPTIONS,
    )


def _scratch(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    """Triton's allocator, which it keeps: so it must hold no tensor."""
    return torch.empty(size, dtype=torch.int8, device=device)


def _new(like: Tensor, *shape: int) -> Tensor:
    """Unwritten float32 on that device."""
    return like.new_empty(shape, dtype=torch.float32)
