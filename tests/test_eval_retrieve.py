"""Retrieval's ranking: by cosine, of equal ones by index, the query left out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastdisco.evals import retrieve
from fastdisco.evals.features import Features


def test_equal_cosines_are_ranked_by_index():
    # Cosines to row 2: 1, 0, itself, 1, -1, 0.
    x = torch.tensor([[2.0, 0], [0, 1], [1, 0], [3, 0], [-1, 0], [0, -5]])
    unit = F.normalize(x, dim=1)
    rows = torch.tensor([2, 4])
    got = retrieve._ranking(unit[rows] @ unit.T, rows).tolist()
    assert got == [[0, 3, 1, 5, 4], [1, 5, 0, 2, 3]]


def test_copies_of_other_classes_count_by_their_index():
    # All images are alike, so the order is that of the indices: whatever is asked, class 0 first.
    f = Features(torch.ones(5, 3), torch.tensor([0, 0, 1, 1, 1]), torch.arange(5))
    got = retrieve.run(f, (1, 2))
    of_0 = [1.0, 1.0]  # the other of class 0 comes first
    # Of class 1, after the two of class 0: places 3 and 4.
    of_1 = [np.mean([1 / 3, 2 / 4])] * 3
    assert got["map"] == pytest.approx(np.mean(of_0 + of_1))
    assert got["recall_at_1"] == got["recall_at_2"] == 2 / 5


@pytest.mark.parametrize("shape", [(40, 3), (7, 2), (200, 16)])
def test_the_ranking_is_a_stable_sort(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    # Copies, among them exact opposites.
    x[1::5], x[2::5] = x[0], -x[0]
    unit, n = F.normalize(x, dim=1), len(x)
    sim = unit @ unit.T
    got = retrieve._ranking(sim.clone(), torch.arange(n)).numpy()
    cosines = np.round(sim.numpy() * 2**20)
    for i in range(n):
        order = np.argsort(-cosines[i], kind="stable")
        assert got[i].tolist() == [j for j in order.tolist() if j != i]
