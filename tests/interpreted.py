"""Every Triton kernel in Triton's interpreter, on the CPU: run by test_triton.py in a process of
its own, for TRITON_INTERPRET is read at import.

The expected values are float64, from the papers, on the operands as the kernel's definition rounds
them: raw rows in the student's dtype, unit rows rounded to the queue's dtype where they meet the
queue, the positive in float32."""

import itertools

import numpy as np
import pytest
import torch
from fastdisco.kernels import queue as triton_queue

# Exp2 and log2 in lanes that a mask discards.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("unwritten"),
]
# RMS(error) / RMS(reference) at a temperature of 0.2 and more.
BOUND = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
DTYPES = list(BOUND)
# B, K, d.
SHAPES = [
    (1, 1, 1),
    (1, 5, 3),
    (3, 1, 16),
    (37, 1001, 128),
    (64, 320, 64),
    (65, 257, 20),
    (5, 300, 200),
    (66, 300, 256),
]
# Two dtypes of the large ones take as long as all small ones.
LARGE = {(37, 1001, 128), (64, 320, 64), (66, 300, 256)}
CASES = [
    pytest.param(
        *shape,
        dtype,
        marks=[pytest.mark.slow] if shape in LARGE and dtype != torch.bfloat16 else [],
    )
    for shape in SHAPES
    for dtype in DTYPES
]


def rms(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def data(b, k, d, dtype, views=2, near=0.7, seed=0):
    """Raw rows z, t [V,B,d] and key [B,d] of very different lengths, key and teacher at a cosine of
    about `near` to z; unit rows [K,d] in dtype."""
    rng = np.random.default_rng([seed, b, k, d])
    rows = lambda *shape: torch.from_numpy(rng.normal(size=shape))
    towards = lambda x: near * unit(x) + (1 - near**2) ** 0.5 * unit(rows(*x.shape))
    z = rows(views, b, d)
    key, t = 3 * towards(z[0]), 0.2 * towards(z)
    return (
        (z * (1 + 9 * rows(views, b, 1).abs())).float(),
        key.float(),
        t.float(),
        unit(rows(k, d)).to(dtype),
    )


def meets(queue):
    """What a unit row is rounded to where it meets the queue: a short queue is read in float32."""
    return queue.dtype if len(queue) > triton_queue.SHORT else torch.float32


def straight(x, dtype):
    """x rounded to dtype in the values, not in the gradient."""
    return x + (x.float().to(dtype).double() - x).detach()


def paper_moco(z, key, t, queue, temp, rounded):
    """log(1 + sum_j exp((q.n_j - q.k) / T)), and the sum over views of the mean of |s - t|^2."""
    z, key, queue = unit(z), unit(key.double()), queue.double()
    near = straight(z[0], rounded) if rounded else z[0]
    contrast = torch.log1p(
        torch.exp((near @ queue.T - (z[0] * key).sum(1, keepdim=True)) / temp).sum(1)
    ).mean()
    return contrast, (z - unit(t.double())).square().sum(-1).mean(1).sum()


def paper_seed(zs, zt, queue, temp_s, temp_t, rounded):
    """-sum_j p_t(j) log p_s(j) over the teacher's own feature and the queue."""
    # Relative to the own feature's score, or a tiny loss is lost in float64 too.
    s, t, queue = unit(zs), unit(zt.double()), queue.double()
    s_near, t_near = (straight(s, rounded), straight(t, rounded)) if rounded else (s, t)
    scores_s = torch.cat([(s * t).sum(1, keepdim=True), s_near @ queue.T], 1) / temp_s
    scores_t = torch.cat([(t * t).sum(1, keepdim=True), t_near @ queue.T], 1) / temp_t
    beside = scores_s - scores_s[:, :1]
    log_p = beside - torch.log1p(torch.exp(beside[:, 1:]).sum(1, keepdim=True))
    return -(scores_t.softmax(1) * log_p).sum(1).mean()


def expected(loss, leaf, *args):
    """Losses and each loss's gradient to the leaf, in float64."""
    leaf = leaf.double().requires_grad_()
    losses = loss(leaf, *args)
    losses = losses if isinstance(losses, tuple) else (losses,)
    return [x.detach() for x in losses], [
        torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in losses
    ]


def close(got, want, dtype, temp, what):
    bound = BOUND[dtype] * max(1, 0.2 / temp)
    error = rms(got, want)
    assert error < bound, f"{what}: {error:.1e}, allowed {bound:.1e}"
    return error


def check_moco(b, k, d, dtype, temp, z_dtype=torch.float32, **kind):
    z, key, t, queue = data(b, k, d, dtype, **kind)
    z, key, t = z.to(z_dtype), key.to(z_dtype), t.to(z_dtype)
    terms, contrast, distill = triton_queue.moco(z, key, t, queue, temp, True)
    (loss, apart), (g_contrast, g_distill) = expected(
        paper_moco, z, key, t, queue, temp, meets(queue)
    )
    (unrounded, _), (g_unrounded, _) = expected(paper_moco, z, key, t, queue, temp, None)
    where = f"B {b} K {k} d {d} {dtype} T {temp}"
    errors = [
        close(terms[0], loss, dtype, temp, f"contrast {where}"),
        close(contrast, g_contrast[0], dtype, temp, f"its gradient {where}"),
        close(terms[1], apart, torch.float32, 1, f"distill {where}"),
        close(distill, g_distill, torch.float32, 1, f"its gradient {where}"),
    ]
    print(
        f"{where}: loss {errors[0]:.1e}, gradient {errors[1]:.1e}; with the rounding of the "
        f"operands: {rms(terms[0], unrounded):.1e}, {rms(contrast, g_unrounded[0]):.1e}"
    )
    assert g_contrast[1:].abs().max() == 0 if len(g_contrast) > 1 else True
    assert {terms.dtype, contrast.dtype, distill.dtype} == {torch.float32}


def check_seed(b, k, d, dtype, temp_s, temp_t, **kind):
    z, zt, _, queue = data(b, k, d, dtype, views=1, **kind)
    loss, grad = triton_queue.seed(z[0], zt, queue, temp_s, temp_t, True)
    (want,), (gradient,) = expected(paper_seed, z[0], zt, queue, temp_s, temp_t, meets(queue))
    (unrounded,), (g_unrounded,) = expected(paper_seed, z[0], zt, queue, temp_s, temp_t, None)
    where, temp = f"B {b} K {k} d {d} {dtype} T {temp_s} {temp_t}", min(temp_s, temp_t)
    errors = (
        close(loss, want, dtype, temp, f"seed {where}"),
        close(grad, gradient, dtype, temp, f"seed's gradient {where}"),
    )
    print(
        f"seed {where}: loss {errors[0]:.1e}, gradient {errors[1]:.1e}; with the rounding of the "
        f"operands: {rms(loss, unrounded):.1e}, {rms(grad, g_unrounded):.1e}"
    )
    # Two sweeps, no gradient.
    alone, nothing = triton_queue.seed(z[0], zt, queue, temp_s, temp_t, False)
    assert nothing.numel() == 0
    close(alone, loss, torch.float32, temp, f"seed without gradient {where}")


@pytest.mark.parametrize("b, k, d, dtype", CASES)
def test_moco_and_disco(b, k, d, dtype):
    check_moco(b, k, d, dtype, 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
# 0.03 is the last with a fixed maximum.
@pytest.mark.parametrize("temp", [1.0, 0.07, 0.03, 0.029, 0.01])
def test_moco_at_every_temperature(temp, dtype):
    check_moco(19, 333, 32, dtype, temp, seed=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_easy_data_at_a_low_temperature_keeps_its_digits(dtype):
    z, key, t, queue = data(16, 512, 128, dtype, near=0.85, seed=2)
    (loss, _), _ = expected(paper_moco, z, key, t, queue, 0.03, dtype)
    assert 1e-8 < loss < 1e-4  # the textbook form loses 5e-2 of it
    check_moco(16, 512, 128, dtype, 0.03, near=0.85, seed=2)


@pytest.mark.parametrize("z_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("views", [1, 3])
def test_students_of_half_width_and_any_number_of_views(views, z_dtype):
    check_moco(9, 100, 32, torch.float32, 0.2, z_dtype=z_dtype, views=views)


@pytest.mark.parametrize("b, k, d, dtype", CASES)
def test_seed(b, k, d, dtype):
    check_seed(b, k, d, dtype, 0.2, 0.07)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temp_s, temp_t", [(0.2, 0.01), (0.07, 0.03), (0.02, 0.04), (0.01, 0.01)])
@pytest.mark.parametrize("near", [0.2, 0.75])
def test_seed_at_every_temperature(temp_s, temp_t, dtype, near):
    check_seed(19, 333, 32, dtype, temp_s, temp_t, near=near, seed=3)


def test_seed_at_its_published_temperature():
    z, zt, _, queue = data(19, 333, 8, torch.float32, views=1, seed=4)
    # Rivals of the own feature.
    queue[:19] = unit(
        unit(zt) + 1e-5 * torch.randn(19, 8, generator=torch.Generator().manual_seed(0))
    )
    loss, grad = triton_queue.seed(z[0], zt, queue, 0.2, 1e-4, True)
    (want,), (gradient,) = expected(paper_seed, z[0], zt, queue, 0.2, 1e-4, torch.float32)
    close(loss, want, torch.float32, 1e-4, "loss")
    close(grad, gradient, torch.float32, 1e-4, "gradient")


def test_no_gradient_no_work_and_no_teacher_no_distance():
    z, key, t, queue = data(7, 50, 16, torch.float32)
    both, alone = (
        triton_queue.moco(z, key, t, queue, 0.2, True),
        triton_queue.moco(z[:1], key, None, queue, 0.2, True),
    )
    terms, contrast, distill = triton_queue.moco(z, key, t, queue, 0.2, False)
    assert torch.equal(terms, both[0]) and contrast.numel() == distill.numel() == 0
    assert (
        torch.equal(alone[0], torch.stack([both[0][0], torch.zeros(())]))
        and torch.equal(alone[1], both[1])
        and alone[2].numel() == 0
    )


def test_strided_inputs_and_zero_rows():
    z, key, t, queue = data(8, 50, 16, torch.float32)
    want = triton_queue.moco(z, key, t, queue, 0.2, True)
    wide = torch.empty(2, 8, 32)
    wide[..., ::2] = z
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            triton_queue.moco(wide[..., ::2], key.T.contiguous().T, t, queue, 0.2, True), want
        )
    )
    z[:, 3] = 0
    terms, contrast, distill = triton_queue.moco(z, key, t, queue, 0.2, True)
    assert terms.isfinite().all() and contrast.isfinite().all() and distill.isfinite().all()


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 1000])
def test_any_split_of_the_queue(multiprocessors, monkeypatch):
    z, _, _, queue = data(20, 515, 32, torch.float32)
    monkeypatch.setattr(triton_queue.launch, "multiprocessors", lambda device: multiprocessors)
    ranges = {
        len(triton_queue.moments([(z[0], temp)], queue, True, temp == 0.2)[0])
        for temp in (0.2, 0.01)
    }
    # Of 64 rows or a multiple, with up to 2 blocks of rows and 4 ctas.
    assert ranges == {{1: 2, 2: 3, 7: 9, 1000: 9}[multiprocessors]}
    check_moco(20, 515, 32, torch.float32, 0.2)
    check_moco(20, 515, 32, torch.float32, 0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, d", [(7, 5), (24, 16), (64, 128)])
def test_enqueue_is_a_ring(size, d, dtype):
    rng = np.random.default_rng(size)
    queue, ptr = torch.zeros(size, d, dtype=dtype), torch.tensor(size - 2)
    plain = queue.clone()
    for n in (size, 1, 0, size - 1, 3, 3, size // 2):
        keys = torch.from_numpy(rng.normal(size=(n, d)) * 10.0 ** rng.integers(-3, 4)).to(
            [torch.float32, torch.bfloat16][n % 2]
        )
        begin = int(ptr)
        triton_queue.enqueue(queue, ptr, keys)
        for i, row in enumerate(unit(keys.double())):
            plain[(begin + i) % size] = row.to(dtype)
        assert int(ptr) == (begin + n) % size
        step = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(queue, plain, rtol=step, atol=1e-7)


def test_the_copy_engine_reads_the_same(monkeypatch):
    """Tiles by descriptor, as on sm_90, against tiles by pointer, also past the queue's last
    row."""
    choose = triton_queue.launch.choose
    for dtype, k, d in itertools.product(DTYPES, (320, 300), (16,)):
        z, key, t, queue = data(20, k, d, dtype)
        want = triton_queue.moco(z, key, t, queue, 0.2, True)
        with monkeypatch.context() as m:
            m.setattr(triton_queue.launch, "choose", lambda *args: choose(*args)._replace(tma=True))
            got = triton_queue.moco(z, key, t, queue, 0.2, True)
        assert all(torch.equal(a, b) for a, b in zip(got, want)), (dtype, k, d)
