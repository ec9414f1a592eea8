"""The kNN evaluation against the weighted vote written out, on one rank and on several."""

import shutil

import numpy as np
import pytest
import torch
from conftest import ranks

from fastdisco import data
from fastdisco.common import dist
from fastdisco.config import UserError
from fastdisco.evals import knn


class Batch:
    def __init__(self, x, y):
        self.views, self.label = [x], y


def made(n, classes, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    x = rng.normal(size=(n, 16)) + 0.5 * np.random.default_rng(0).normal(size=(classes, 16))[y]
    return x, y


def batches(x, y, size):
    return [
        Batch(torch.tensor(x[i : i + size]), torch.tensor(y[i : i + size]))
        for i in range(0, len(x), size)
    ]


def vote(bank, query, classes, k, temp):
    """The rule written out in float64."""
    (bx, by), (qx, qy) = bank, query
    bx, qx = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bx, qx))
    right = 0
    for x, y in zip(qx, qy):
        sim = bx @ x
        near = np.argsort(-sim)[:k]
        votes = np.zeros(classes)
        for i in near:
            votes[by[i]] += np.exp(sim[i] / temp)
        right += votes.argmax() == y
    return right / len(qy)


def test_equals_the_vote_written_out():
    bank, query = made(300, 7, 1), made(101, 7, 2)
    # The last: more neighbours than there are images.
    for k, temp in [(1, 0.07), (20, 0.07), (20, 1.0), (1000, 0.5)]:
        got = knn.run(lambda x: x, batches(*bank, 64), batches(*query, 17), 7, k, temp)["knn_top1"]
        assert got == vote(bank, query, 7, k, temp)
        assert 0.2 < got < 1  # neither chance nor trivial


def test_the_features_are_normalised():
    bank, query = made(200, 5, 3), made(50, 5, 4)
    scaled = bank[0] * np.random.default_rng(5).uniform(0.1, 10, size=(200, 1)), bank[1]
    a, b = (knn.run(lambda x: x, batches(*v, 50), batches(*query, 50), 5) for v in (bank, scaled))
    assert a == b


def on_a_rank():
    """kNN of parts that differ in length by rank, some with fewer bank images than neighbours."""
    dist.defaults()
    torch.distributed.init_process_group("gloo")
    r, n = dist.rank(), dist.world()
    assert torch.distributed.get_world_size() == n
    (bx, by), (qx, qy) = made(23, 7, 1), made(101, 7, 2)
    return [
        knn.run(lambda x: x, batches(bx[r::n], by[r::n], 9), batches(qx[r::n], qy[r::n], 17), 7, k)[
            "knn_top1"
        ]
        for k in (5, 20)
    ]


def test_any_number_of_ranks_gives_one_number():
    (one,) = ranks(1, on_a_rank)
    assert one == [vote(made(23, 7, 1), made(101, 7, 2), 7, k, 0.07) for k in (5, 20)]
    for n in (2, 3):
        assert ranks(n, on_a_rank) == [one] * n


def test_other_classes_are_refused(folder, tmp_path):
    shutil.copytree(folder / "val", tmp_path / "val")
    (tmp_path / "val/class2").rename(tmp_path / "val/other")
    with pytest.raises(UserError, match="class2, other"):
        data.same_classes(data.listing(folder / "train"), data.listing(tmp_path / "val"))
    val = data.listing(folder / "val")
    with pytest.raises(UserError, match="in another order"):
        data.same_classes(val, val._replace(classes=val.classes[::-1]))
