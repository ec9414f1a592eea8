"""The queue losses as ops: the dispatcher's checks, torch.compile, autograd's contract, SEED and
the cross-view loss against float64, refusals; and on a GPU the Triton form against float64, in CUDA
graphs, under compile, without a wait for the device."""

import itertools
import math

import numpy as np
import pytest
import torch
from fastdisco.kernels import chunked, ops, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdisco import kernels

pytestmark = pytest.mark.usefixtures("unwritten")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICES = [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rms(got, want):
    want = want.double().cpu()
    return float(
        (got.double().cpu() - want).norm() / max(want.norm(), 1.2e-38 * want.numel() ** 0.5)
    )


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def rows(seed, *shape):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape))


def data(
    b=6, k=40, d=16, views=2, dtype=torch.float64, queue_dtype=None, device=CPU, near=0.7, seed=0
):
    """Raw z [V,B,d] that requires grad, raw key [B,d] and t [V,B,d] at a cosine of about `near` to
    it, unit rows [K,d]."""
    z = rows(seed, views, b, d)
    t = near * unit(z) + (1 - near**2) ** 0.5 * unit(rows(seed + 1, views, b, d))
    key = near * unit(z[0]) + (1 - near**2) ** 0.5 * unit(rows(seed + 2, b, d))
    to = lambda x: x.to(device, dtype)
    return (
        to(4 * z).requires_grad_(),
        to(key),
        to(3 * t),
        unit(rows(seed + 3, k, d)).to(device, queue_dtype or dtype),
    )


def paper_seed(zs, zt, queue, temp_s, temp_t):
    """-sum_j p_t(j) log p_s(j) over the teacher's own feature and the queue, in float64."""
    s, t, queue = unit(zs.double()), unit(zt.double()), queue.double()
    scores = lambda x, temp: torch.cat([(x * t).sum(1, keepdim=True), x @ queue.T], 1) / temp
    student = scores(s, temp_s)
    # Relative to the own feature's, or a small loss is lost in float64 too.
    beside = student - student[:, :1]
    log_p = beside - torch.log1p(torch.exp(beside[:, 1:]).sum(1, keepdim=True))
    return -(scores(t, temp_t).softmax(1) * log_p).sum(1).mean()


def value_and_grad(loss, leaf, *args, upstream=1.0):
    leaf = leaf.detach().clone().requires_grad_()
    value = loss(leaf, *args)
    (upstream * value).backward()
    return value.detach(), leaf.grad


# ---- registration


def samples(device, **kind):
    """Arguments of each op; the last says whether gradients are wanted."""
    z, key, t, queue = data(device=device, **kind)
    for goal, wanted in itertools.product((t, None), (True, False)):
        yield ops.moco, (z if wanted else z.detach(), key, goal, queue, 0.2, wanted)
    for wanted in (True, False):
        yield ops.seed, (z[0] if wanted else z[0].detach(), t[0], queue, 0.2, 0.05, wanted)
    yield ops.enqueue, (queue.clone(), torch.tensor(38, device=device), key)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dispatcher_is_told_the_truth(device, dtype):
    for op, args in samples(device, dtype=dtype):
        torch.library.opcheck(op, args)


def step(z, key, t, queue, ptr):
    contrast, distill = kernels.moco(z, key, queue, 0.2, t)
    loss = (
        contrast
        + 3 * distill
        + kernels.seed(z[0], t[0], queue, 0.2, 0.05)
        + kernels.swapped(z, t.softmax(-1), 0.1)
    )
    kernels.enqueue(queue, ptr, key)
    return loss


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_traces_a_step_whole(device):
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    z, key, t, queue = data(device=device, dtype=torch.float32)
    found = []
    for f in (step, compiled):
        ring, ptr = queue.clone(), torch.tensor(38, device=device)
        found.append((*value_and_grad(f, z, key, t, ring, ptr), ring, ptr))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert int(found[1][3]) == 4 and not torch.equal(found[1][2], queue)


@pytest.mark.parametrize("upstream", [(1.0, 0.0), (0.0, 1.0), (-2.5, 3.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_loss_sends_back_its_own_gradient(upstream, dtype):
    z, key, t, queue = data(dtype=dtype, views=3)

    def weighed(contrast, distill):
        return upstream[0] * contrast + upstream[1] * distill

    value, grad = value_and_grad(lambda z: weighed(*kernels.moco(z, key, queue, 0.2, t)), z)
    want, gradient = value_and_grad(
        lambda z: weighed(reference.info_nce(z[0], key, queue, 0.2), reference.distill(z, t)),
        z.double(),
    )
    assert (
        grad.dtype == dtype
        and rms(value, want) < 1e-6
        and rms(grad, gradient) < (4e-3 if dtype == torch.bfloat16 else 2e-6)
    )
    alone = value_and_grad(lambda z: kernels.moco(z, key, queue, 0.2)[0], z)[1]
    assert (
        rms(alone[0], value_and_grad(kernels.info_nce, z[0], key, queue, 0.2)[1]) == 0
        and alone[1:].abs().max() == 0
    )


def test_without_a_teacher_there_is_no_distance():
    z, key, t, queue = data()
    contrast, distill = kernels.moco(z, key, queue, 0.2)
    assert distill == 0 and torch.equal(contrast, kernels.moco(z, key, queue, 0.2, t)[0])


# ---- SEED

TEMPS = [(0.2, 0.07), (0.2, 0.01), (0.07, 0.01), (0.02, 0.05), (0.2, 1e-4)]


@pytest.mark.parametrize("temp_s, temp_t", TEMPS)
@pytest.mark.parametrize("near", [0.1, 0.7])
@pytest.mark.parametrize("b, k, d", [(1, 1, 3), (5, 13, 7), (33, 1, 16), (17, 301, 31)])
def test_seed_is_the_formula(b, k, d, near, temp_s, temp_t, monkeypatch):
    for dtype, bound in (
        (torch.float64, 1e-11),
        (torch.float32, 1e-6 * max(1, 0.2 / min(temp_s, temp_t))),
    ):
        z, _, t, queue = data(b, k, d, dtype=dtype, near=near)
        want, gradient = value_and_grad(
            paper_seed, z[0].double(), t[0], queue, temp_s, temp_t, upstream=3.7
        )
        for chunk in (2 * b, 13 * b, 2**21):
            monkeypatch.setattr(chunked, "LOGITS", chunk)
            loss, grad = value_and_grad(
                kernels.seed, z[0], t[0], queue, temp_s, temp_t, upstream=3.7
            )
            assert (
                loss.dtype == grad.dtype == dtype
                and rms(loss, want) < bound
                and rms(grad, gradient) < bound
            )
            assert rms(kernels.seed(z[0].detach(), t[0], queue, temp_s, temp_t), want) < bound
    z, _, t, queue = data(b, k, d, near=near)
    loss, grad = value_and_grad(reference.seed, z[0], t[0], queue, temp_s, temp_t)
    want, gradient = value_and_grad(paper_seed, z[0], t[0], queue, temp_s, temp_t)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(grad, gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("temp_s, temp_t", [(0.2, 0.05), (0.02, 0.01)])
def test_seed_passes_gradcheck(temp_s, temp_t):
    z, _, t, queue = data(3, 11, 5)
    assert torch.autograd.gradcheck(
        lambda s: kernels.seed(s, t[0], queue, temp_s, temp_t),
        z[0].detach().clone().requires_grad_(),
    )


def test_a_perfect_student_is_left_with_the_teachers_entropy():
    _, _, t, queue = data(4, 50, 16)
    t = unit(t[0])
    p = torch.cat([torch.ones(4, 1), t @ queue.T], 1).div(0.1).softmax(1)
    loss, grad = value_and_grad(kernels.seed, 5 * t, t, queue, 0.1, 0.1)
    assert rms(loss, -(p * p.log()).sum(1).mean()) < 1e-12 and grad.abs().max() < 1e-13


@pytest.mark.parametrize(
    "loss",
    [
        lambda *a: sum(kernels.moco(*a)),
        lambda z, k, q, temp, t: kernels.seed(z[0], t[0], q, temp, 0.05),
    ],
)
def test_derivatives_are_first_order_only(loss):
    z, key, t, queue = data()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(z, key, queue, 0.2, t), z, create_graph=True)


# ---- properties, on any data

cases = st.tuples(
    st.integers(1, 9),
    st.integers(1, 60),
    st.integers(2, 24),
    st.sampled_from([0.01, 0.03, 0.2, 1.0]),
    st.integers(0, 2**31),
)
LOSSES = {
    "info_nce": lambda z, key, t, queue, temp: kernels.info_nce(z[0], key, queue, temp),
    "seed": lambda z, key, t, queue, temp: kernels.seed(z[0], t[0], queue, temp, 0.05),
}


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_the_queues_order_does_not_matter(name, case):
    b, k, d, temp, seed = case
    z, key, t, queue = data(b, k, d, seed=seed)
    want = value_and_grad(LOSSES[name], z, key, t, queue, temp)
    got = value_and_grad(LOSSES[name], z, key, t, queue[torch.randperm(k)], temp)
    for a, e in zip(got, want):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=40, deadline=None)
@given(case=cases, scale=st.floats(1e-3, 1e3))
def test_the_length_of_a_row_does_not_matter(name, case, scale):
    b, k, d, temp, seed = case
    z, key, t, queue = data(b, k, d, seed=seed)
    value, grad = value_and_grad(LOSSES[name], z, key, t, queue, temp)
    scaled, shorter = value_and_grad(LOSSES[name], scale * z, key / scale, scale * t, queue, temp)
    torch.testing.assert_close(scaled, value, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(scale * shorter, grad, rtol=1e-8, atol=1e-12)
    # Nothing pulls along the row.
    assert (z[0] * grad[0]).sum(1).abs().max() <= 1e-11 * max(1, grad.abs().max() * z.abs().max())


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_a_negative_that_comes_twice_counts_twice(case):
    b, k, d, temp, seed = case
    z, key, _, queue = data(b, k, d, seed=seed)
    loss = kernels.info_nce(z[0], key, torch.cat([queue, queue]), temp)
    q, key = unit(z[0]), unit(key)
    ratio = torch.exp((q @ queue.T - (q * key).sum(1, keepdim=True)) / temp).sum(1)
    torch.testing.assert_close(loss, torch.log1p(2 * ratio).mean(), rtol=1e-9, atol=1e-13)


# ---- the cross-view loss


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v, g, b, p", [(2, 2, 3, 7), (8, 2, 4, 30), (3, 1, 1, 5), (3, 3, 2, 2)])
def test_swapped_is_the_formula(v, g, b, p, dtype, device):
    scores, targets = rows(0, v, b, p).to(device, dtype), rows(1, g, b, p).softmax(-1).to(device)

    def paper(scores):
        """-1/(pairs B) sum over g, v != g and images of sum_j target_j log softmax(score / T)_j, in
        float64"""
        log_p = torch.log_softmax(scores.double() / 0.1, -1)
        return -sum((targets[i] * log_p[j]).sum() for i in range(g) for j in range(v) if i != j) / (
            g * (v - 1) * b
        )

    want, gradient = value_and_grad(paper, scores.double(), upstream=3.7)
    loss, grad = value_and_grad(
        kernels.swapped,
        scores,
        targets.to(dtype if dtype == torch.float64 else torch.float32),
        0.1,
        upstream=3.7,
    )
    tight = 1e-12 if dtype == torch.float64 else 2e-6  # of scores / T of up to 30
    assert (
        rms(loss, want) < tight
        and grad.dtype == dtype
        and rms(grad, gradient) < (4e-3 if dtype == torch.bfloat16 else tight)
    )
    assert rms(reference.swapped(scores, targets, 0.1), want) < tight


def test_swapped_keeps_no_probabilities():
    scores, targets = (
        rows(0, 4, 8, 1000).float().requires_grad_(),
        rows(1, 2, 8, 1000).softmax(-1).float(),
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernels.swapped(scores, targets, 0.1)
    # Log-sum-exp, targets and the scores themselves.
    assert sorted(x.numel() for x in kept) == [4 * 8, 2 * 8 * 1000, 4 * 8 * 1000]
    assert {x.data_ptr() for x in kept} >= {scores.data_ptr(), targets.data_ptr()}


# ---- refusals


def test_what_does_not_fit_is_refused():
    z, key, t, queue = data(dtype=torch.float32)
    grad = lambda x: x.clone().requires_grad_()
    for call, message in [
        (lambda: kernels.moco(z[0], key, queue, 0.2), r"z \[6, 16\]"),
        (lambda: kernels.moco(z, key, queue, 0.2, t[:1]), r"z \[2, 6, 16\] and t \[1, 6, 16\]"),
        (lambda: kernels.moco(z, key, queue, 0.2, grad(t)), "t requires grad.*detach"),
        (lambda: kernels.seed(z[0], grad(t[0]), queue), "zt requires grad.*detach"),
        (lambda: kernels.seed(z[0], t[0, :3], queue), r"\[6, 16\].*\[3, 16\]"),
        (lambda: kernels.seed(z[0], t[0], queue[:, :8].contiguous()), r"\[6, 16\].*\[40, 8\]"),
        (lambda: kernels.seed(z[0], t[0], queue, 0.0), "temp_s is 0.0"),
        (lambda: kernels.seed(z[0], t[0], queue, 0.2, math.nan), "temp_t is nan"),
        (lambda: kernels.moco(z, key, queue[:0], 0.2), "empty"),
        (
            lambda: kernels.moco(z, key, queue.T.contiguous().T, 0.2),
            "queue has strides.*contiguous",
        ),
        (lambda: kernels.moco(z, key, queue[::2], 0.2), "queue has strides.*contiguous"),
        (lambda: kernels.moco(z, key, queue.to("meta"), 0.2), "queue is on meta.*on cpu"),
        (lambda: kernels.enqueue(queue, torch.tensor(0), key[:, :3]), r"\[6, 3\].*\[40, 16\]"),
        (lambda: kernels.enqueue(queue.to("meta"), torch.tensor(0), key), "meta"),
        (lambda: kernels.enqueue(queue[:5].clone(), torch.tensor(0), key), "5 keys.* 6 "),
        (lambda: kernels.swapped(z, t[:, :, :3], 0.1), r"\[2, 6, 3\].*\[2, 6, 16\]"),
        (lambda: kernels.swapped(z[:1], t[:1], 0.1), "V >= 2"),
        (lambda: kernels.swapped(z, grad(t), 0.1), "targets requires grad"),
        (lambda: kernels.swapped(z, t, 0.0), "temp is 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("device", DEVICES)
def test_a_queue_that_was_never_normalised_is_refused(device):
    z, key, t, queue = data(dtype=torch.float32, device=device)
    for broken in (queue * 1.5, torch.randn_like(queue), torch.zeros_like(queue), queue.clone()):
        broken[3] *= 1.1
        with pytest.raises(ValueError, match="queue holds a row whose length is off by .* from 1"):
            kernels.moco(z, key, broken, 0.2)
    for dtype in DTYPES:
        kernels.seed(z[0], t[0], queue.to(dtype), 0.2, 0.01)  # rounding is no such thing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_colder_than_the_queues_rounding_is_refused(dtype):
    z, _, t, queue = data(dtype=torch.float32)
    with pytest.raises(ValueError, match="temp_t is 0.0001 .*rounding.*float32 queue"):
        kernels.seed(z[0], t[0], queue.to(dtype), 0.2, 1e-4)
    kernels.seed(z[0], t[0], queue, 0.2, 1e-4)


def test_the_maximum_is_fixed_only_where_nothing_that_counts_vanishes():
    for temp in (0.03, 0.07, 1.0):
        assert (
            chunked.fixed_maximum(temp, own=False)
            and np.exp(np.float32(-2 / temp)) > np.finfo(np.float32).tiny
        )
    assert not chunked.fixed_maximum(0.0299, own=False)
    assert chunked.fixed_maximum(0.01, own=True) and not chunked.fixed_maximum(0.0099, own=True)


# ---- on a GPU

BOUND = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


def on_gpu(b, k, d, dtype, views=2, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, device="cuda", generator=g)
    z, queue = 3 * new(views, b, d), torch.empty(k, d, device="cuda", dtype=dtype)
    for part in queue.split(1 << 18):
        part.copy_(unit(new(*part.shape)))
    return z, unit(z[0]) + unit(new(b, d)), unit(z) + unit(new(views, b, d)), queue


def met(z, queue):
    """The raw rows such that their unit rows are those that meet the queue: rounded to its
    dtype."""
    return unit(z.double()).float().to(queue.dtype).double()


def paper_info_nce(z, key, queue, temp, rounded):
    """In float64 by pieces of the queue; the gradient as of the rounding not being there."""
    q, key = unit(z.double()), unit(key.double())
    near = met(z, queue) if rounded else q
    positive = (q * key).sum(1, keepdim=True)
    total, mean = 0, 0
    for part in queue.split(1 << 15):
        p = torch.exp((near @ part.double().T - positive) / temp)
        total, mean = total + p.sum(1, keepdim=True), mean + p @ part.double()
    share = total / (1 + total)
    grad = (share * (mean / total - key)) / (temp * len(z))
    return torch.log1p(total).mean(), (
        grad - (grad * q).sum(1, keepdim=True) * q
    ) / z.double().norm(dim=1, keepdim=True)


def paper_seed_gradients(z, t, queue, temp, rounded):
    """What student and teacher each add to SEED's gradient at the student's raw rows, in float64:
    the gradient is the first less the second.  Both by the shares of the queue, since 1 less the
    share of the own feature has no digits left where that is nearly 1."""
    q, goal, wide = unit(z.double()), unit(t.double()), queue.double()
    near, far = (met(z, queue), met(t, queue)) if rounded else (q, goal)
    # The teacher's cosine to its own feature is 1.
    cosines = (q * goal).sum(1, keepdim=True), torch.ones_like(q[:, :1])
    parts = []
    for x, own in zip((near, far), cosines):
        p = torch.cat([own, x @ wide.T], 1).div(temp).softmax(1)[:, 1:]
        g = (p @ wide - p.sum(1, keepdim=True) * goal) / (temp * len(z))
        parts.append((g - (g * q).sum(1, keepdim=True) * q) / z.double().norm(dim=1, keepdim=True))
    return parts


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temp", [0.2, 0.07, 0.01])
@pytest.mark.parametrize(
    "b, k, d",
    [
        (1, 1, 16),
        (5, 300, 20),
        (64, 4096, 128),
        (257, 65536, 128),
        (100, 1001, 256),
        (300, 8192, 64),
        (33, 5000, 100),
        (16, 2000, 384),
    ],
)
def test_the_gpu_agrees_with_float64(b, k, d, temp, dtype):
    z, key, t, queue = on_gpu(b, k, d, dtype)
    rounded = k > 256 and d <= 256  # a short queue is read in float32, wide rows take chunked torch
    loss, gradient = paper_info_nce(z[0], key, queue, temp, rounded)
    leaf = z.clone().requires_grad_()
    contrast, distill = kernels.moco(leaf, key, queue, temp, t)
    bound = BOUND[dtype] * max(1, 0.2 / temp)
    (grad,) = torch.autograd.grad(contrast, leaf, retain_graph=True)
    unrounded = paper_info_nce(z[0], key, queue, temp, False)
    print(
        f"B {b} K {k} d {d} {dtype} T {temp}: {rms(contrast, loss):.1e} "
        f"{rms(grad[0], gradient):.1e}; with rounding {rms(contrast, unrounded[0]):.1e}"
    )
    assert rms(contrast, loss) < bound and rms(grad[0], gradient) < bound
    (grad,) = torch.autograd.grad(distill, leaf)
    want, gradient = value_and_grad(reference.distill, z.double(), t.double())
    assert rms(distill, want) < 1e-6 and rms(grad, gradient) < 2e-6
    s = z[0].clone().requires_grad_()
    kernels.seed(s, t[0], queue, temp, temp).backward()
    of_student, of_teacher = paper_seed_gradients(z[0], t[0], queue, temp, rounded)
    # Where student and teacher agree, the gradient is the small difference of two large ones.
    error = (s.grad.double() - (of_student - of_teacher)).norm()
    # Below its smallest normal number float32 has no precision either.
    assert error < 2 * bound * max(of_student.norm(), 1.2e-38)


@pytest.mark.gpu
def test_a_million_rows_and_bit_for_bit_repeats():
    z, key, t, queue = on_gpu(64, 1 << 20, 128, torch.bfloat16)
    loss, gradient = paper_info_nce(z[0], key, queue, 0.2, True)
    found = [value_and_grad(lambda x: kernels.moco(x, key, queue, 0.2, t)[0], z) for _ in range(3)]
    assert rms(found[0][0], loss) < 1e-3 and rms(found[0][1][0], gradient) < 1e-3
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0]))


@pytest.mark.gpu
def test_64_bit_offsets():
    k = (1 << 31) // 128 + 1000  # K d passes 2^31
    queue = torch.zeros(k, 128, device="cuda", dtype=torch.bfloat16)
    queue[:, 0] = 1
    queue[-1, :2] = torch.tensor([0.0, 1.0])
    z = torch.zeros(1, 4, 128, device="cuda")
    z[..., 1] = 1
    loss = kernels.moco(z, z[0], queue, 0.2)[0]  # negatives: k - 1 at cosine 0, the last at 1
    assert (
        rms(loss, torch.log1p(torch.tensor((k - 1) * math.exp(-5) + 1, dtype=torch.float64))) < 1e-3
    )
    ptr = torch.tensor(k - 1, device="cuda")
    kernels.enqueue(queue, ptr, z[0][:2] * 3)
    assert queue[-1, 1] == 1 and queue[0, 1] == 1 and queue[1, 0] == 1 and int(ptr) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graphs_capture_a_step_and_nothing_waits(dtype):
    z, key, t, queue = on_gpu(96, 4096, 128, dtype)
    ptr = torch.tensor(4090, device="cuda")
    z.requires_grad_()

    def work():
        contrast, distill = kernels.moco(z, key, queue, 0.2, t)
        loss = contrast + distill + kernels.seed(z[0], t[0], queue, 0.2, 0.05)
        (grad,) = torch.autograd.grad(loss, z)
        kernels.enqueue(queue, ptr, key)
        return loss.detach(), grad

    work()  # compiles, and checks the queue's rows
    start = queue.clone(), ptr.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = [work() for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = queue.clone(), ptr.clone()
    queue.copy_(start[0]), ptr.copy_(start[1])
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        loss, grad = work()
    queue.copy_(start[0]), ptr.copy_(start[1])
    for want in eager:
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(loss, want[0]) and torch.equal(grad, want[1])
    assert torch.equal(queue, after[0]) and torch.equal(ptr, after[1])


@pytest.mark.gpu
def test_every_launch_of_the_table_runs():
    """Each row of this GPU's table, the few and the many, fixed and running maximum, through the op
    itself."""
    for dtype, d, b, temp in itertools.product(DTYPES, (64, 128, 256), (64, 65), (0.2, 0.01)):
        z, key, _, queue = on_gpu(b, 4096, d, dtype)
        loss, gradient = paper_info_nce(z[0], key, queue, temp, True)
        value, grad = value_and_grad(kernels.info_nce, z[0], key, queue, temp)
        bound = BOUND[dtype] * max(1, 0.2 / temp)
        assert rms(value, loss) < bound and rms(grad, gradient) < bound, (dtype, d, b, temp)


@pytest.mark.gpu
def test_memory_beside_the_inputs_is_small():
    z, key, _, queue = on_gpu(1024, 65536, 128, torch.bfloat16, views=1)
    z.requires_grad_()
    kernels.moco(z, key, queue, 0.2)[0].backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.moco(z, key, queue, 0.2)[0].backward()
    # Of one matrix of logits.
    assert torch.cuda.max_memory_allocated() - before < 1024 * 65536 * 4 / 8
