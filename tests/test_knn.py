"""The kNN evaluation against the weighted vote written out, on one rank and on several."""
import sys
import textwrap

import numpy as np
import torch
from conftest import ROOT, launch, run
from fastdisco.evals import knn


class Batch:
    def __init__(self, x, y):
        self.views, self.label = [x], y


def made(n, classes, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    x = rng.normal(size=(n, 16)) + 1.5 * np.random.default_rng(0).normal(size=(classes, 16))[y]
    return x, y


def batches(x, y, size):
    return [Batch(torch.tensor(x[i:i + size]), torch.tensor(y[i:i + size])) for i in range(0, len(x), size)]


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
    for k, temp in [(1, 0.07), (20, 0.07), (20, 1.0), (1000, 0.5)]:  # the last: more neighbours than there are images
        got = knn.run(lambda x: x, batches(*bank, 64), batches(*query, 17), 7, k, temp)["knn_top1"]
        assert got == vote(bank, query, 7, k, temp)
        assert 0.2 < got < 1  # neither chance nor trivial


def test_the_features_are_normalised():
    bank, query = made(200, 5, 3), made(50, 5, 4)
    scaled = bank[0] * np.random.default_rng(5).uniform(0.1, 10, size=(200, 1)), bank[1]
    a, b = (knn.run(lambda x: x, batches(*v, 50), batches(*query, 50), 5) for v in (bank, scaled))
    assert a == b


def test_any_number_of_ranks_gives_one_number(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(f"""
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
        import torch.distributed as td
        from fastdisco import dist
        from fastdisco.evals import knn
        from test_knn import made, batches
        dist.defaults(); td.init_process_group("gloo")
        (bx, by), (qx, qy) = made(23, 7, 1), made(101, 7, 2)  # fewer bank images on a rank than neighbours, and uneven parts
        r, w = dist.rank(), dist.world()
        for k in (5, 20):
            s = knn.run(lambda x: x, batches(bx[r::w], by[r::w], 9), batches(qx[r::w], qy[r::w], 17), 7, k)
            print(f"rank {{r}} of {{w}} k {{k}}: {{s['knn_top1']:.9f}}")
    """))
    one = knn_lines(run(sys.executable, script))
    assert len(one) == 2
    for ranks in (2, 3):
        lines = knn_lines(launch(script, ranks=ranks))
        assert len(lines) == 2 * ranks and set(lines) == set(one)


def knn_lines(text):
    return [x.split(" k ")[1] for x in text.splitlines() if x.startswith("rank ")]
