"""Ridge and logistic regression against scikit-learn, and kNN, retrieval and health against what
they are written out."""

import time

import numpy as np
import pytest
import torch
from conftest import ranks
from made import join, made, part
from sklearn.linear_model import LogisticRegression, Ridge
from test_knn import vote

from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.evals import features, health, logistic, neighbours, retrieve, ridge, shares

CLASSES = 6


def sets(n=300):
    return made(n, CLASSES, 1), made(60, CLASSES, 2), made(101, CLASSES, 3)


def as_numpy(f):
    return f.x.double().numpy(), f.label.numpy()


def test_ridge_is_scikit_learns_for_every_penalty():
    train, _, val = sets()
    (x, y), (v, label) = as_numpy(train), as_numpy(val)
    solution = ridge.solve(train, CLASSES)
    for penalty in (1e-3, 1.0, 50.0, 1e4):
        theirs = Ridge(alpha=penalty).fit(x, np.eye(CLASSES)[y])
        w, b = solution.weights(penalty)
        np.testing.assert_allclose(w.T, theirs.coef_, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(b, theirs.intercept_, rtol=1e-8, atol=1e-10)
        strength = penalty / float(solution.values.mean())
        got = ridge.run(train, None, val, CLASSES, [strength])
        right = theirs.predict(v).argmax(1) == label
        assert got["ridge_top1_best_on_val"] == right.mean()
        assert 0.3 < right.mean() < 1


def test_ridge_with_more_features_than_images_and_one_that_never_varies():
    train, val = made(12, CLASSES, 1, width=40), made(50, CLASSES, 3, width=40)
    train.x[:, 3] = val.x[:, 3] = 7
    x, y = as_numpy(train)
    theirs = Ridge(alpha=0.5).fit(x, np.eye(CLASSES)[y])
    w, b = ridge.solve(train, CLASSES).weights(0.5)
    np.testing.assert_allclose(w.T, theirs.coef_, atol=1e-9)
    np.testing.assert_allclose(b, theirs.intercept_, atol=1e-9)


def test_the_penalty_is_chosen_on_the_images_held_out():
    train, held, val = sets(40)
    got, classes = ridge.predict(train, held, val, CLASSES)
    each = [
        ridge.run(train, None, part, CLASSES, [s]) for part in (held, val) for s in ridge.STRENGTHS
    ]
    each = np.array([e["ridge_top1_best_on_val"] for e in each]).reshape(2, -1)
    at = each[0].argmax()
    assert got["ridge_top1_selected"] == each[1, at] == (classes == val.label).double().mean()
    assert got["ridge_top1_held_out"] == each[0, at]
    assert got["ridge_top1_best_on_val"] == each[1].max()
    assert got["ridge_strength"] == ridge.STRENGTHS[at]
    assert each[1].max() > each[1].min()


@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
def test_logistic_is_scikit_learns(c):
    train, _, val = sets()
    double = [f._replace(x=f.x.double()) for f in (train, val)]
    (x, y), (v, _) = (as_numpy(f) for f in double)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(x, y)
    w, b = logistic.fit(double[0], CLASSES, c, iterations=1000, tolerance=1e-7)
    ours = (v @ w.numpy() + b.numpy(), theirs.decision_function(v))
    ours, want = (z - z.mean(1, keepdims=True) for z in ours)
    np.testing.assert_allclose(ours, want, atol=2e-4)
    w, b = logistic.fit(train, CLASSES, c, iterations=1000, tolerance=1e-7)
    z = v @ w.numpy() + b.numpy()
    np.testing.assert_allclose(z - z.mean(1, keepdims=True), want, atol=5e-3)


def test_logistic_standardises_and_chooses():
    train, held, val = sets(80)
    uneven = torch.logspace(-2, 2, 16)
    scaled = [f._replace(x=f.x * uneven + 5) for f in (train, held, val)]
    a = logistic.run(train, held, val, CLASSES)
    assert a == logistic.run(*scaled, CLASSES)
    (x, y), (h, hy), (v, vy) = (as_numpy(f) for f in (train, held, val))
    mean, std = x.mean(0), x.std(0)
    fits = [LogisticRegression(C=c, max_iter=5000).fit((x - mean) / std, y) for c in logistic.CS]
    on_held = [m.score((h - mean) / std, hy) for m in fits]
    at = int(np.argmax(on_held))
    assert a["logistic_c"] == logistic.CS[at]
    assert a["logistic_top1_selected"] == fits[at].score((v - mean) / std, vy)


KS, TEMPS = (1, 5, 20, 100), (0.07, 0.5)


@pytest.mark.parametrize("chunks", [(1024, 16384), (7, 16), (1, 300)])
def test_neighbours_are_the_vote_written_out(monkeypatch, chunks):
    monkeypatch.setattr(neighbours, "QUERIES", chunks[0])
    monkeypatch.setattr(neighbours.nearest, "__defaults__", (chunks[1],))
    bank, _, val = sets()
    got = neighbours.run(bank, val, CLASSES, KS, TEMPS)
    for k in KS:
        for t in TEMPS:
            want = vote(as_numpy(bank), as_numpy(val), CLASSES, k, t)
            assert got[neighbours.name(k, t)] == want and 0.2 < want < 1
    assert len(got) == 8


def test_copies_with_other_labels_answer_by_index_in_any_chunks():
    bank, _, val = sets()
    # Each image four times, each time of another class.
    many = features.Features(
        bank.x.repeat(4, 1),
        torch.cat([(bank.label + i) % CLASSES for i in range(4)]),
        torch.arange(1200),
    )
    shuffled = many.take(torch.randperm(1200, generator=torch.Generator().manual_seed(0)))
    a, b = (neighbours.predict(f, val, CLASSES, (1, 6)) for f in (many, shuffled))
    assert all(torch.equal(a[k], b[k]) for k in a)
    first = neighbours.predict(bank, val, CLASSES, (1,))["knn_top1_k1_t0.07"]
    assert torch.equal(a["knn_top1_k1_t0.07"], first)


def test_a_small_temperature_does_not_overflow():
    bank, _, val = sets()
    got = neighbours.run(bank, val, CLASSES, (1, 20), (1e-4,))
    assert got["knn_top1_k20_t0.0001"] == got["knn_top1_k1_t0.0001"]


def test_more_neighbours_than_images_are_refused():
    bank, _, val = sets(30)
    with pytest.raises(UserError, match="200 neighbours of 30 bank images"):
        neighbours.run(bank, val, CLASSES)


def ranked(f):
    """Average precision and hits of every query, written out."""
    x, y = as_numpy(f)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    precisions, hits = [], []
    for i in range(len(x)):
        order = [j for j in np.argsort(-(x @ x[i]), kind="stable") if j != i]
        right = y[order] == y[i]
        if right.any():
            found = np.flatnonzero(right)
            precisions.append(np.mean([(r + 1) / (p + 1) for r, p in enumerate(found)]))
            hits.append([right[:k].any() for k in (1, 5, 10)])
    return np.mean(precisions), np.mean(hits, 0), len(hits)


@pytest.mark.parametrize("cells", [2**24, 500])
def test_retrieval_is_the_ranking_written_out(monkeypatch, cells):
    monkeypatch.setattr(retrieve, "CELLS", cells)
    f = sets()[2]
    f.label[0] = CLASSES  # alone in its class: asks nothing
    precision, hits, asked = ranked(f)
    got = retrieve.run(f)
    # Cosines that agree in 20 bits are equal here.
    assert got["map"] == pytest.approx(precision, abs=1e-5) and asked == 100
    assert [got[f"recall_at_{k}"] for k in (1, 5, 10)] == pytest.approx(list(hits))
    assert got["retrieve_queries"] == asked and 0.1 < precision < 0.9


def test_retrieval_needs_two_images_of_a_class():
    f = made(4, 4, 0)._replace(label=torch.arange(4))
    with pytest.raises(UserError, match="no class has two of the 4 images"):
        retrieve.run(f)


def found_on_a_rank():
    train, held, val = (part(f) for f in sets())
    few = part(made(13, CLASSES, 5))
    found = {
        "ridge": ridge.run(train, held, val, CLASSES),
        "logistic": logistic.run(train, held, val, CLASSES, (0.01, 1.0)),
        "knn": neighbours.run(train, val, CLASSES, KS, TEMPS),
        "few": neighbours.run(few, val, CLASSES, (1, 12)),
        "retrieve": retrieve.run(val),
        "health": health.run(features.gathered(val)),
    }
    whole = features.gathered(val)
    assert all(torch.equal(a, b) for a, b in zip(whole, sets()[2]))
    return found


def refusal(f):
    try:
        features.refuse_useless(f, "val")
    except UserError as e:
        return str(e)


def on_a_rank():
    join()
    # One rank alone has the broken row; all must refuse.
    broken = sets()[2]
    broken.x[2, 0] = torch.nan
    # Sorted by class, so that each rank sees other ones.
    whole = sets()[2]
    rows = whole.label.argsort().tensor_split(dist.world())[dist.rank()]
    features.refuse_few(whole.take(rows), CLASSES, "val", 101)
    return found_on_a_rank(), refusal(part(broken, mix=False))


def test_any_number_of_ranks_gives_the_same_numbers_and_refusals():
    one = found_on_a_rank()
    for found, said in ranks(3, on_a_rank):
        assert found.keys() == one.keys()
        for what in one:
            assert found[what] == pytest.approx(one[what], abs=1e-6), what
        assert "val: the features of 1 images are no finite numbers" in said


def test_useless_features_and_sets_are_refused():
    f = sets()[2]
    features.refuse_useless(f, "val")
    features.refuse_few(f, CLASSES, "val")
    constant = f._replace(x=f.x[:1].expand(101, -1) * 3 + torch.rand(101, 16) * 1e-6)
    with pytest.raises(UserError, match="val: the features are the same for all 101 images"):
        features.refuse_useless(constant, "val")
    with pytest.raises(UserError, match="the features are the same for all"):
        features.refuse_useless(f._replace(x=torch.zeros(101, 16)), "val")
    with pytest.raises(UserError, match="all 101 images are of one class"):
        features.refuse_few(f._replace(label=torch.ones_like(f.label)), CLASSES, "val")
    with pytest.raises(UserError, match="5 images are fewer than 6 classes"):
        features.refuse_few(f.take(torch.arange(5)), CLASSES, "train")
    with pytest.raises(UserError, match="101 images are fewer than 200 neighbours"):
        features.refuse_few(f, CLASSES, "train", 200)


class Batch:
    def __init__(self, f, rows):
        self.views, self.label, self.index = [f.x[rows]], f.label[rows], f.index[rows]


def test_collect_keeps_every_kind_of_one_pass():
    f = sets()[2]
    seen = []

    def encode(x):
        seen.append(len(x))
        return {"features": x, "embedding": x.half() * 2}

    batches = [Batch(f, torch.arange(a, min(a + 40, 101))) for a in range(0, 101, 40)]
    got = features.collect(encode, batches)
    assert seen == [40, 40, 21]
    assert all(torch.equal(a, b) for a, b in zip(got["features"], f))
    assert torch.equal(got["embedding"].x, (f.x.half() * 2).float())
    with pytest.raises(UserError, match="rank 0 of 1 gets none of the images"):
        features.collect(encode, [])


def test_health_of_features_with_a_known_answer():
    eye = torch.eye(8).repeat(4, 1)
    assert health.rankme(eye) == pytest.approx(8, rel=1e-4)
    one = torch.randn(30, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 8)
    assert health.rankme(one) == pytest.approx(1, abs=1e-3)
    assert health.spread(one.abs()) == pytest.approx(0, abs=1e-6)
    even = torch.randn(20000, 8, generator=torch.Generator().manual_seed(0))
    assert health.spread(even) == pytest.approx(1, abs=0.01)
    assert health.alignment(eye, eye * 3) == 0
    assert health.alignment(eye, -eye) == pytest.approx(4)
    # Two points, each twice: of the 12 ordered pairs 4 are at squared distance 0 and 8 at 4.
    points = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert health.uniformity(points) == pytest.approx(np.log((4 + 8 * np.exp(-8)) / 12))


def test_health_against_what_is_written_out():
    f, other = made(90, CLASSES, 1), made(90, CLASSES, 2)
    x, y = as_numpy(f)
    singular = np.linalg.svd(x, compute_uv=False)
    p = singular / singular.sum() + 1e-7
    assert health.rankme(f.x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    far = ((u[:, None] - u[None]) ** 2).sum(2)
    pair = (y[:, None] == y[None]) & ~np.eye(90, dtype=bool)
    assert health.class_alignment(f.x, f.label) == pytest.approx(far[pair].mean())
    other_pairs = far[~np.eye(90, dtype=bool)]
    assert health.uniformity(f.x, rows=17) == pytest.approx(
        np.log(np.exp(-2 * other_pairs).mean()), abs=1e-5
    )
    near = []
    for t in (f.x, other.x):
        z = t.numpy() / np.linalg.norm(t.numpy(), axis=1, keepdims=True)
        sim = z @ z.T - 9 * np.eye(90)
        near.append([set(np.argsort(-row)[:20]) for row in sim])
    both = np.mean([len(a & b) / 20 for a, b in zip(*near)])
    assert health.agreement(f.x, other.x) == pytest.approx(both)
    assert health.agreement(f.x, f.x * 2) == 1


def test_cka_ignores_rotation_scale_and_shift():
    f = made(90, CLASSES, 1)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    assert health.cka(f.x, f.x @ turn * 3 + 1) == pytest.approx(1)
    x, y = as_numpy(f)[0], as_numpy(made(90, CLASSES, 2, width=7))[0]
    centre = np.eye(90) - 1 / 90
    k, m = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    want = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert health.cka(f.x, torch.tensor(y)) == pytest.approx(want)


def test_the_gap_to_the_teacher():
    label = torch.tensor([0, 0, 1, 1, 2, 2])
    teacher = torch.tensor([0, 0, 1, 1, 2, 0])
    student = torch.tensor([0, 0, 1, 0, 2, 2])
    alone = torch.tensor([0, 1, 0, 0, 2, 0])
    found, worst = health.gap(student, teacher, label, ["a", "b", "c"], alone, worst=2)
    assert found["teacher_gap"] == pytest.approx(0)
    assert found["teacher_gap_closed"] == pytest.approx((5 / 6 - 2 / 6) / (5 / 6 - 2 / 6))
    assert worst == {"b": 0.5, "a": 0.0}
    assert list(worst) == ["b", "a"]


def test_health_of_two_networks():
    f = sets()[2]
    got = health.run(f, f._replace(x=f.x * 2), f.x, f.x * 3)
    assert got["teacher_cka"] == pytest.approx(1) and got["teacher_neighbours"] == 1
    assert got["teacher_cosine"] == pytest.approx(1)
    assert "alignment" not in health.run(f, labelled=False)
    with pytest.raises(UserError, match="saw other images"):
        health.run(f, f._replace(index=f.index + 1))


def test_shares_are_normal_numbers_and_sum_to_one():
    logits = torch.linspace(0, -400, 801).repeat(3, 1)
    p = logits.softmax(1)
    got = shares.normal_(p)
    assert got is p
    want = logits.double().softmax(1)
    # What a sum of products over a few thousand images divides by stays above it, too.
    assert got.min() > 1e6 * torch.finfo(torch.float32).tiny
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-25)


def test_confident_heads_cost_no_more_than_others():
    # Of the confident one a sixth of the shares are denormal.
    torch.manual_seed(0)
    train = features.Features(torch.randn(512, 256), torch.arange(512) % 200, torch.arange(512))
    heads = [torch.randn(257, 200) * scale for scale in (0.01, 2)]

    def seconds(head):
        start = time.process_time()
        logistic._objective(train, head, 512, 1.0)
        return time.process_time() - start

    plain, confident = (min(seconds(head) for _ in range(5)) for head in heads)
    assert confident < 5 * plain
