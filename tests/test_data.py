"""The loaders: the order, views hashed from (seed, epoch, image, view), batches as they are handed
over, evaluation."""

import gc

import numpy as np
import pytest
import torch
from image_sets import CPU, SMALL, Spy, make, pixels, stream
from PIL import Image
from torchvision.transforms import functional as F

from fastdisco import data
from fastdisco.config import Crop
from fastdisco.data import loader, pipelines


@pytest.fixture(scope="module")
def usual(few):
    return stream(make(few))


# --- the order, and what a view depends on


@pytest.mark.parametrize("case", ["batch", "threads", "accumulate", "chunks", "ranks"])
def test_views_depend_on_seed_epoch_image_and_view_alone(few, usual, case, monkeypatch):
    found = {}
    if case == "ranks":
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            part, _ = stream(make(few, batch=4))
            # Equal steps, no image on two ranks.
            assert len(part) == 3 * 5 * 4 and not part.keys() & found.keys()
            found |= part
    else:
        if case == "chunks":
            monkeypatch.setattr(pipelines, "CHUNK", 1)  # a pipeline per epoch
        found, _ = stream(
            make(
                few,
                **dict(
                    batch=dict(batch=5),
                    threads=dict(threads=2),
                    accumulate=dict(batch=4, accumulate=2),
                    chunks={},
                )[case],
            )
        )
    both = found.keys() & usual[0].keys()
    assert len(both) >= 0.9 * len(usual[0])
    assert all(found[k] == usual[0][k] for k in both)
    if case != "batch":
        assert found.keys() == usual[0].keys()


@pytest.mark.parametrize("start", [0, 1, 4, 5, 8, 14, 15])
def test_a_restart_continues_the_stream(few, usual, start):
    seen, order = stream(make(few, start=start))
    assert order == usual[1][start * 8 :]
    assert all(seen[k] == usual[0][k] for k in order)


def test_a_position_set_later_continues_the_stream(few, usual):
    """What a resume does, also back and forth within the pipeline that is open."""
    train = make(few)
    for position in (7, 14, 0, 5, 9, 10):
        train.position = position
        batch = next(train)
        want = usual[1][position * 8 : position * 8 + 8]
        assert train.position == position + 1 and batch.index.tolist() == [i for _, i in want]
        assert [b"".join(v[i].numpy().tobytes() for v in batch.views) for i in range(8)] == [
            usual[0][k] for k in want
        ]
    train.position = 15
    assert list(train) == []


def test_a_global_batch_holds_the_same_images_for_any_ranks_and_accumulation(
    few, usual, monkeypatch
):
    want = [sorted(usual[1][i : i + 8]) for i in range(0, len(usual[1]), 8)]
    _, order = stream(make(few, batch=2, accumulate=4))
    assert [sorted(order[i : i + 8]) for i in range(0, len(order), 8)] == want
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        parts.append(stream(make(few, batch=2, accumulate=2))[1])
    assert [
        sorted(parts[0][i : i + 4] + parts[1][i : i + 4]) for i in range(0, len(parts[0]), 4)
    ] == want


def test_every_epoch_has_another_order_and_leaves_out_other_images(usual):
    epochs = [[i for e, i in usual[1] if e == epoch] for epoch in range(3)]
    assert [len(e) for e in epochs] == [40, 40, 40]  # 43 images, batches of 8
    assert len({tuple(e) for e in epochs}) == 3
    assert len({frozenset(range(43)) - frozenset(e) for e in epochs}) == 3


def test_order_is_a_permutation_fixed_for_good():
    assert loader.permutation(3, 1, 10).tolist() == [9, 7, 8, 3, 5, 6, 4, 0, 2, 1]
    assert sorted(loader.permutation(2**32 - 1, 199, 1000).tolist()) == list(range(1000))
    first = np.array([loader.permutation(0, e, 50)[:10] for e in range(400)])
    # Every image is used equally often.
    assert abs(np.bincount(first.ravel(), minlength=50) - 80).max() < 5 * 80**0.5


def test_views_epochs_and_seeds_differ(few, usual):
    same = (Crop(size=24),) * 2
    batch = next(make(few, same))
    assert not any(torch.equal(a, b) for a, b in zip(*batch.views))
    other = next(make(few, same, seed=1))
    places = dict(zip(other.index.tolist(), other.views[0]))
    shared = [(i, v) for i, v in zip(batch.index.tolist(), batch.views[0]) if i in places]
    assert batch.index.tolist() != other.index.tolist() and shared
    assert not any(torch.equal(v, places[i]) for i, v in shared)
    again = [usual[0][e, i] for i in range(43) for e in range(3) if (e, i) in usual[0]]
    assert len(set(again)) == len(again)


def test_position_steps_labels_and_the_end(few):
    train = make(few, batch=4, accumulate=3, epochs=2)
    assert (train.steps_per_epoch, train.position) == (3, 0)
    batches = list(train)
    assert len(batches) == 2 * 3 * 3 == train.position and next(train, None) is None
    for b in batches:
        assert b.label.tolist() == [few.labels[i] for i in b.index.tolist()]
        assert b.label.dtype == b.index.dtype == torch.int64


# --- hand-over


def test_batches_are_channels_last_without_a_copy_and_outlive_the_loader(few):
    train = make(few, epochs=2)
    batch = next(train)
    train._pipes = [Spy(*train._pipes)]
    second = next(train)
    assert [v.data_ptr() for v in second.views] == train._pipes[0].pointers
    kept = [b.clone() for b in batch.views + second.views]
    for v, crop in zip(batch.views, SMALL):
        assert v.shape == (8, 3, crop.size, crop.size) and v.dtype == torch.float32
        assert v.is_contiguous(memory_format=torch.channels_last) and not v.is_contiguous()
    for _ in range(6):
        next(train)
    assert all(torch.equal(a, b) for a, b in zip(kept, batch.views + second.views))
    del train
    gc.collect()
    list(make(few, epochs=2))
    assert all(torch.equal(a, b) for a, b in zip(kept, batch.views + second.views))


# --- evaluation


@pytest.mark.parametrize("resize, size", [(64, 56), (75, 64), (40, 40), (33, 8)])
def test_evaluation_views_are_torchvisions(resize, size, folder, photos, tmp_path):
    for i, (w, h) in enumerate([(97, 60), (60, 97), (33, 33), (20, 31), (41, 200), (199, 64)]):
        (tmp_path / "c").mkdir(exist_ok=True)
        Image.open(photos.root / photos.files[i % 4]).resize((w, h)).save(
            tmp_path / "c" / f"{i}.png"
        )
    for listing in (photos, data.listing(tmp_path)):
        for batch in data.EvalLoader(listing, resize, size, 3, 1, CPU):
            for view, index in zip(batch.views[0], batch.index.tolist()):
                want = F.center_crop(
                    F.resize(Image.open(listing.root / listing.files[index]), resize), size
                )
                d = abs(pixels(view, Crop()) - np.asarray(want, float))
                # The outermost pixels differ most, see graph.py.
                assert d.mean() < 0.5 and d.max() < 20, listing.files[index]
                assert d[1:-1, 1:-1].max() <= 3, listing.files[index]


def test_evaluation_goes_through_the_indices_in_order_again_and_again(few):
    indices = [5, 3, 40, 3, 0, 12, 42]
    ev = data.EvalLoader(few, 24, 16, 3, 1, CPU, indices)
    first, second = list(ev), list(ev)
    assert len(ev) == 7 and [len(b.index) for b in first] == [3, 3, 1] == [
        len(b.views[0]) for b in first
    ]
    assert torch.cat([b.index for b in first]).tolist() == indices
    assert torch.cat([b.label for b in first]).tolist() == few.labels[indices].tolist()
    assert all(torch.equal(a.views[0], b.views[0]) for a, b in zip(first, second))
    whole = torch.cat([b.views[0] for b in data.EvalLoader(few, 24, 16, 64, 2, CPU)])
    assert torch.equal(whole[indices], torch.cat([b.views[0] for b in first]))
    assert list(data.EvalLoader(few, 24, 16, 3, 1, CPU, [])) == []
    halved = next(
        iter(data.EvalLoader(few, 24, 16, 3, 1, CPU, indices, mean=(0.0,) * 3, std=(2.0,) * 3))
    )
    assert (
        abs(
            pixels(halved.views[0][0], Crop(mean=(0,) * 3, std=(2,) * 3))
            - pixels(first[0].views[0][0], Crop())
        ).max()
        < 1e-3
    )
