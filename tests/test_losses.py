"""The losses and the queue against float64 formulas and plain lists; what the fast forms may not
allocate, keep or compute."""

import math

import numpy as np
import pytest
import torch
from fastdisco.kernels import chunked, reference
from torch.utils._python_dispatch import TorchDispatchMode

from fastdisco import kernels
from fastdisco.models.queue import Queue

pytestmark = pytest.mark.usefixtures("unwritten")

TEMPS = [0.01, 0.029, 0.03, 0.07, 0.2, 1.0]  # on both sides of the running maximum's limit
# Bf16 is rounded by whoever made it: the loss itself is fp32.
LOSS = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float64: 1e-13}
# A bf16 gradient is rounded once.
GRAD = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float64: 1e-12}


def rms(got, want):
    """RMS(error) / RMS(reference), the latter at least float32's smallest normal number."""
    return float((got.double() - want).norm() / max(want.norm(), 1.2e-38 * want.numel() ** 0.5))


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def rows(seed, *shape, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * scale)


def data(b, k, d, dtype=torch.float32, near=0.7, seed=0):
    """Raw q and k [b,d] at a cosine of about `near`, of very different lengths, and unit rows
    [k,d]; float64 values rounded to dtype."""
    positive = rows(seed, b, d)
    query = near * unit(positive) + (1 - near**2) ** 0.5 * unit(rows(seed + 1, b, d))
    # As the queue holds them.
    queue = unit(rows(seed + 2, k, d)).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    return (
        (query * (1 + 9 * rows(seed + 3, b, 1).abs())).to(dtype).requires_grad_(),
        (3 * positive).to(dtype),
        queue,
    )


def paper_info_nce(q, k, queue, temp):
    """-log(exp(q.k/T) / (exp(q.k/T) + sum_j exp(q.n_j/T))) of unit rows, in float64, as a log1p:
    nothing large is subtracted."""
    q, k, queue = unit(q.double()), unit(k.double()), queue.double()
    ratio = torch.exp((q @ queue.T - (q * k).sum(1, keepdim=True)) / temp).sum(1)
    return torch.log1p(ratio).mean()


def paper_distill(zs, zt):
    """sum over views of mean over images of ||s - t||^2, in float64."""
    return sum(
        (unit(s.double()) - unit(t.double())).square().sum() / len(s) for s, t in zip(zs, zt)
    )


def both(loss, q, *rest, upstream=1.0):
    """The loss and upstream * its gradient to q."""
    leaf = q.detach().clone().requires_grad_()
    value = loss(leaf, *rest)
    (upstream * value).backward()
    return value.detach(), leaf.grad


def expected(paper, q, *rest, upstream=1.0):
    return both(paper, q.double(), *rest, upstream=upstream)


# ---- InfoNCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temp", TEMPS)
@pytest.mark.parametrize(
    "b, k, d", [(1, 1, 3), (5, 13, 7), (1, 129, 16), (33, 1, 16), (17, 301, 31)]
)
def test_info_nce_is_the_formula(b, k, d, temp, dtype, monkeypatch):
    q, key, queue = data(b, k, d, dtype)
    want, gradient = expected(paper_info_nce, q, key, queue, temp, upstream=3.7)
    # One row at a time, several with a rest, exactly all of 13, all but one, one chunk.
    for chunk in (1, 4 * b, 13 * b, 13 * b - 1, 2**21):
        monkeypatch.setattr(chunked, "LOGITS", chunk)
        loss, grad = both(kernels.info_nce, q, key, queue, temp, upstream=3.7)
        assert (
            loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            and grad.dtype == dtype
        )
        # a float32 logit has an error of 6e-8 / temp, which the loss takes over; it matters where
        # the loss itself is small
        assert rms(loss, want) < LOSS[dtype] * max(1, 0.1 / temp), chunk
        assert rms(grad, gradient) < GRAD[dtype] * max(
            1, 0.1 / temp if dtype == torch.float32 else 1
        ), chunk


@pytest.mark.parametrize("temp", TEMPS)
def test_info_nce_reference_is_the_formula(temp):
    q, key, queue = data(17, 301, 31, torch.float64)
    loss, grad = both(reference.info_nce, q, key, queue, temp)
    want, gradient = expected(paper_info_nce, q, key, queue, temp)
    assert rms(loss, want) < 1e-11 and rms(grad, gradient) < 1e-11
    loss, _ = both(reference.info_nce, q.float(), key.float(), queue.float(), 0.2)
    assert rms(loss, expected(paper_info_nce, q.float(), key.float(), queue.float(), 0.2)[0]) < 1e-6


def test_an_easy_image_keeps_its_digits():
    q, key, queue = data(64, 4096, 128, near=0.8, seed=5)
    want, gradient = expected(paper_info_nce, q, key, queue, 0.03)
    assert 1e-7 < want < 1e-4  # what an easy image's loss is

    def textbook(q, k, queue, temp):  # m + log(l) - s_pos
        q, k = unit(q), unit(k)
        s = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temp
        m = s.amax(1)
        return (m + (s - m[:, None]).exp().sum(1).log() - s[:, 0]).mean()

    lost = rms(both(textbook, q, key, queue, 0.03)[0], want)
    loss, grad = both(kernels.info_nce, q, key, queue, 0.03)
    assert lost > 0.05 and rms(loss, want) < 1e-5 and rms(grad, gradient) < 1e-5


def test_opposite_and_equal_rows_stay_finite():
    for temp in TEMPS:
        for sign in (-1.0, 1.0):  # every negative opposite to the queries, or equal to them
            key, queue = -sign * torch.eye(4)[:1].repeat(3, 1), sign * torch.eye(4)[:1].repeat(9, 1)
            q = torch.tensor(
                [[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [2.0, 0, 0.3, 0]], requires_grad=True
            )
            want, gradient = expected(paper_info_nce, q, key, queue, temp)
            loss, grad = both(kernels.info_nce, q, key, queue, temp)
            torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-30)
            assert (grad - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-30


@pytest.mark.parametrize("temp", [0.01, 0.2])
def test_info_nce_passes_gradcheck(temp, monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 12)
    q, key, queue = data(3, 11, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda q: kernels.info_nce(q, key, queue, temp), q)


def test_the_length_of_a_query_does_not_matter():
    q, key, queue = data(9, 50, 16, torch.float64)
    loss, grad = both(kernels.info_nce, q, key, queue, 0.2)
    longer, shorter = both(kernels.info_nce, 5 * q, 7 * key, queue, 0.2)
    assert rms(longer, loss) < 1e-14 and rms(5 * shorter, grad) < 1e-13
    assert (q * grad).sum(1).abs().max() < 1e-13  # so nothing pulls along the query


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_of_the_size_of_all_logits_exists():
    q, key, queue = data(96, 65536, 8)
    with Largest() as fast:
        # What the op runs: the recording does not look into an op.
        chunked.moco(q[None].detach(), key, None, queue, 0.2, True)
    with Largest() as seed:
        chunked.seed(q.detach(), key, queue, 0.2, 0.01, True)
    with Largest() as plain:
        reference.info_nce(q, key, queue, 0.2).backward()
    assert plain.elements == 96 * 65537  # the recording sees forward and backward
    assert fast.elements <= chunked.LOGITS and seed.elements <= chunked.LOGITS < 96 * 65536 / 2


@pytest.mark.parametrize("temp", [0.01, 0.2])
def test_the_queue_may_be_overwritten_right_after_the_forward(temp):
    q, key, queue = data(9, 50, 16)
    _, want = both(kernels.info_nce, q, key, queue, temp)
    loss = kernels.info_nce(q, key, queue, temp)
    queue.fill_(math.nan)
    loss.backward()
    assert torch.equal(q.grad, want)


class Exponentials(TorchDispatchMode):
    """The smallest that is not 0, of all that are computed."""

    smallest = math.inf

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "exp_":
            self.smallest = min(self.smallest, out[out > 0].min().item())
        return out


@pytest.mark.parametrize("temp_s, temp_t", [(0.2, 0.01), (0.2, 0.015), (0.2, 1e-4), (0.02, 0.01)])
def test_no_exponential_underflows(temp_s, temp_t):
    """A processor takes many times as long for numbers below the smallest normal one; SEED's
    teacher is cold enough for them."""
    zs, zt, queue = data(9, 500, 128, near=0.5)
    with Exponentials() as seen:
        chunked.seed(zs.detach(), zt, queue, temp_s, temp_t, True)
        chunked.moco(zs[None].detach(), zt, None, queue, temp_t, True)
    assert torch.finfo(torch.float32).tiny * 1e3 < seen.smallest < 1


class Calls(TorchDispatchMode):
    """Counts matrix products, and keeps what the queue losses were asked for."""

    def __init__(self):
        super().__init__()
        self.products, self.differentiate = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += "mm" in func.overloadpacket.__name__
        if func.namespace == "fastdisco":
            self.differentiate.append(args[-1])
        return func(*args, **(kwargs or {}))


def test_the_gradient_is_not_computed_where_nobody_asks():
    q, key, queue = data(8, 100, 16)

    def asked(loss, q, *rest):
        with Calls() as calls:
            value = loss(q, key, queue, *rest)
        assert value.requires_grad == calls.differentiate[0] and len(calls.differentiate) == 1
        return value.requires_grad

    for loss in (kernels.info_nce, kernels.seed):
        with torch.no_grad():
            assert not asked(loss, q, 0.2)
        assert not asked(loss, q.detach(), 0.2) and asked(loss, q, 0.2)

    def products(form, *args):
        with Calls() as calls, torch.no_grad():
            form(*args)
        return calls.products

    assert products(chunked.moco, q[None], key, None, queue, 0.2, False) == 1  # the similarities
    # And the softmax's mean of the queue.
    assert products(chunked.moco, q[None], key, None, queue, 0.2, True) == 2
    # The student's similarities; the teacher's and their mean.
    assert products(chunked.seed, q, key, queue, 0.2, 0.01, False) == 3
    assert products(chunked.seed, q, key, queue, 0.2, 0.01, True) == 2  # both at once


def test_a_second_derivative_is_refused():
    q, key, queue = data(3, 5, 4, torch.float64)
    # And not answered by what passes through the normalisation alone.
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(kernels.info_nce(q, key, queue, 0.2), q, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    q, key, queue = data(9, 50, 16, dtype)
    zs, zt = q.detach().reshape(3, 3, 16), key.reshape(3, 3, 16)
    for loss, *args in (
        (kernels.info_nce, q, key, queue, 0.2),
        (kernels.info_nce, q, key, queue, 0.01),
        (kernels.distill, zs, zt),
    ):
        want = both(loss, *args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
            leaf = args[0].detach().clone().requires_grad_()
            value = loss(leaf, *args[1:])
        value.backward()
        assert (
            value.dtype == torch.float32
            and torch.equal(value, want[0])
            and torch.equal(leaf.grad, want[1])
        )


def test_info_nce_refuses_what_does_not_fit():
    q, k, queue = torch.randn(4, 8), torch.randn(4, 8), torch.randn(9, 8)
    for args, message in [
        ((q, k[:3], queue, 0.2), r"\[4, 8\].*\[3, 8\]"),
        ((q, k[:, :7], queue, 0.2), r"\[4, 8\].*\[4, 7\]"),
        ((q, k, queue[:, :7], 0.2), r"8\].*7\]"),
        ((q, k.clone().requires_grad_(), queue, 0.2), r"\bk\b.*detach"),
        ((q, k, queue.clone().requires_grad_(), 0.2), "queue.*detach"),
        ((q, k, queue, 0.0), r"temp.* 0\.0.*positive"),
        ((q, k, queue, -0.2), r"temp.* -0\.2.*positive"),
        ((q, k, queue, math.nan), "temp.* nan.*positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernels.info_nce(*args)


# ---- distillation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("v, b, d", [(1, 1, 3), (2, 17, 31), (8, 5, 128)])
def test_distill_is_the_formula(v, b, d, dtype):
    zs, zt = rows(0, v, b, d, scale=4).to(dtype), rows(1, v, b, d, scale=0.1).to(dtype)
    want, gradient = expected(paper_distill, zs, zt, upstream=3.7)
    loss, grad = both(kernels.distill, zs, zt, upstream=3.7)
    assert (
        loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        and grad.dtype == dtype
    )
    assert rms(loss, want) < LOSS[dtype] and rms(grad, gradient) < GRAD[dtype]
    loss, grad = both(reference.distill, zs.double(), zt.double(), upstream=3.7)
    assert rms(loss, want) < 1e-13 and rms(grad, gradient) < 1e-12


def test_a_nearly_distilled_student_keeps_its_digits():
    zt = rows(0, 2, 16, 128)
    zs = (zt + rows(1, 2, 16, 128, scale=1e-3)).float()
    want, gradient = expected(paper_distill, zs, zt.float())
    loss, grad = both(kernels.distill, zs, zt.float())
    # 2 - 2 cos would have an error of 1e-7 / 2e-6.
    assert want < 1e-5 and rms(loss, want) < 1e-3 and rms(grad, gradient) < 1e-3


def test_distill_at_its_ends():
    z = rows(0, 2, 5, 16)
    assert kernels.distill(z, 3 * z) < 1e-28 and abs(kernels.distill(z, -z) - 8) < 1e-13  # 0..4V
    assert torch.autograd.gradcheck(
        lambda s: kernels.distill(s, rows(1, 2, 5, 16)), z.clone().requires_grad_()
    )


def test_distill_refuses_what_does_not_fit():
    z = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match=r"\[2, 4, 8\].*\[1, 4, 8\]"):
        kernels.distill(z, z[:1])
    with pytest.raises(ValueError, match="zt.*detach"):
        kernels.distill(z, z.clone().requires_grad_())


# ---- the queue


@pytest.mark.parametrize("k", [1, 2, 7, 24])
def test_the_queue_is_a_ring(k):
    queue = Queue(k, 5, seed=3)
    address = queue.rows.data_ptr(), queue.ptr.data_ptr()
    plain, at = queue.rows.tolist(), 0
    rng = np.random.default_rng(k)
    for step in range(60):
        n = (1, k, k - 1)[step] if step < 3 else int(rng.integers(0, k + 1))
        keys = torch.from_numpy(rng.normal(size=(n, 5)) * 10.0 ** rng.integers(-3, 4)).to(
            [torch.float32, torch.bfloat16][step % 2]
        )
        queue.enqueue(keys.requires_grad_())
        for key in keys.detach().double():
            plain[at] = unit(key).tolist()
            at = (at + 1) % k
        np.testing.assert_allclose(queue.rows.numpy(), np.array(plain), rtol=0, atol=2e-7)
        assert int(queue.ptr) == at
        if step == 30:
            queue.load_state_dict({name: x.clone() for name, x in queue.state_dict().items()})
    # Captured graphs may hold them.
    assert not queue.rows.requires_grad and (queue.rows.data_ptr(), queue.ptr.data_ptr()) == address


def test_more_keys_than_rows_are_refused_and_change_nothing():
    queue = Queue(4, 3, seed=0)
    before = queue.rows.clone()
    with pytest.raises(ValueError, match=r"4 keys.* 5\b"):
        queue.enqueue(torch.randn(5, 3))
    assert torch.equal(queue.rows, before) and int(queue.ptr) == 0


def test_a_queue_starts_with_unit_rows_in_all_directions_drawn_by_its_seed():
    torch.manual_seed(1)
    a = Queue(512, 16, seed=7)
    state = torch.random.get_rng_state()
    b, c = Queue(512, 16, seed=7), Queue(512, 16, seed=8)
    assert torch.equal(a.rows, b.rows) and not torch.isclose(a.rows, c.rows).all(1).any()
    # The global stream, which draws the weights, is left alone.
    assert torch.equal(torch.random.get_rng_state(), state)
    assert a.rows.dtype == torch.float32 and (a.rows.double().norm(dim=1) - 1).abs().max() < 2e-7
    cosines = a.rows.double() @ a.rows.double().T
    # Of uniform directions: 1 / d.
    assert abs(cosines[~torch.eye(512, dtype=bool)].var() * 16 - 1) < 0.05
    assert sorted(a.state_dict()) == ["ptr", "rows"] and not list(a.parameters())
