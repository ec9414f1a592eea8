"""What must not change a number: how many images the backbone takes at a time; and SimCLR's lists at
their full length."""

import numpy as np
import pytest
from test_eval_command import LINEAR, a_run, evaluate

from fastdisco.data import Listing
from fastdisco.evals import results, splits


@pytest.fixture(scope="module")
def run(textures, tmp_path_factory):
    return a_run(textures, tmp_path_factory.mktemp("runs"))


def test_the_batch_of_the_backbone_changes_nothing(run, capsys, tmp_path):
    more = [*LINEAR, "linear.lrs=[0.1, 1]", "linear.held=0.1", "probe.held=0.1", "probe.epochs=2"]
    more += ["semi.shares=0.3", "semi.epochs=2", "semi.batch=8", "semi.lr=0.1"]
    every = []
    for batch in (8, 7, 64):
        out = tmp_path / str(batch)
        arguments = ["all", run, f"--out={out}", f"data.eval_batch={batch}", *more]
        every.append((evaluate(capsys, *arguments)[0], {r.hash for r in results.read_all(out)}))
    (want, hashes), *others = every
    for values, theirs in others:
        assert theirs == hashes and values.keys() == want.keys()
        for key, value in values.items():
            # A map hangs on the last bits of the features.
            if not key.startswith("eval/tsne_"):
                assert value == pytest.approx(want[key], abs=1e-5), key


@pytest.mark.parametrize("name, count", splits.PUBLISHED.items())
def test_the_published_lists_have_their_count(tmp_path, capsys, name, count):
    files = [f"n{i % 1000:04}/n{i % 1000:04}_{i}.JPEG" for i in range(130_000)]
    labels = np.arange(130_000) % 1000
    images = Listing(tmp_path, tmp_path, files, labels, [f"n{c:04}" for c in range(1000)])
    names = [f.partition("/")[2] for f in files[:count]]
    (tmp_path / name).write_text("\n".join(names) + "\n")
    assert splits.published(tmp_path / name, images).tolist() == list(range(count))
    assert not capsys.readouterr().out
    # As read by the official copier, which takes the first for a header.
    (tmp_path / name).write_text("\n".join(names[1:]))
    assert splits.published(tmp_path / name, images).tolist() == list(range(1, count))
    assert f"has {count - 1} names, the published list {count}" in capsys.readouterr().out
