"""bn.shuffle: load gives what gather gives: the same views on the same ranks, keys, queue and
contrast; what differs is what it says."""

import numpy as np
import pytest
import torch
import torch.distributed as td
from conftest import ranks, tiny
from test_moco import Run, batch
from training import _differences, _train, losses

from fastdisco import config, data
from fastdisco.common import dist
from fastdisco.config import Crop, UserError
from fastdisco.data import pack

pytestmark = pytest.mark.usefixtures("unwritten")

SEED, MICRO = 3, 4
CROPS = Crop(size=24), Crop(size=24, blur_p=1.0), Crop(size=16, scale=(0.1, 0.3))


# ---- the loader


def _loaded(source, start):
    """Of micro batches start .. start + 6, over the end of an epoch: the two loaders' views and
    indices, gathered ones split as MoCo does."""
    td.init_process_group("gloo")
    listing = data.listing(source)
    own, permuted = (
        data.TrainLoader(
            listing, CROPS, MICRO, SEED, 3, 2, 2, torch.device("cpu"), start, permuted=p
        )
        for p in (False, True)
    )
    for i in range(start, start + 6):
        a, b = next(own), next(permuted)
        assert (
            torch.equal(a.index, b.index)
            and torch.equal(a.label, b.label)
            and torch.equal(a.views[0], b.views[0])
        )
        order = dist.Shuffle(MICRO, dist.mix(SEED, i))
        for view, mine in zip(a.views[1:], b.views[1:], strict=True):
            assert torch.equal(order.split(view), mine) and not torch.equal(view, mine)
            assert mine.is_contiguous(memory_format=torch.channels_last)
    td.destroy_process_group()
    return True


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("kind", ["files", "tars"])
def test_every_rank_loads_what_the_shuffle_would_have_sent_it(folder, tmp_path, kind, start):
    source = folder / "train"
    if kind == "tars":
        source = tmp_path / "tars"
        pack.pack(folder / "train", source, shard_mb=0.02)
        assert len(list(source.glob("*.tar"))) > 2
    assert all(ranks(2, _loaded, source, start))


# ---- the method


def _steps(shuffle, bn, teacher):
    """Losses and terms of 3 steps as means over ranks, and the queue; `load` gets view B as the
    loader hands it out."""
    td.init_process_group("gloo")
    run = Run(bn=bn, teacher=teacher, shuffle=shuffle, groups=2 if bn else 1, queue=20)
    mine = slice(dist.rank() * 4, dist.rank() * 4 + 4)
    out = []
    for step in range(3):
        a, b = batch(step, 8)
        b = b[dist.Shuffle(4, dist.mix(7, step)).mine if shuffle == "load" else mine]
        loss, _, terms = run.step(step, [a[mine], b])
        means = {
            k: dist.all_mean(terms[k].detach().clone()).item()
            for k in ("contrast", "distill")
            if k in terms
        }
        out.append(
            (
                dist.all_mean(torch.tensor(loss, dtype=torch.float64)).item(),
                means,
                run.method.queue.rows.numpy().copy(),
            )
        )
    td.destroy_process_group()
    return out


@pytest.mark.parametrize(
    "bn, teacher",
    [(True, False), (False, True), (True, True)],
    ids=["moco with BN", "disco without BN", "disco with BN"],
)
def test_keys_queue_and_contrast_are_those_of_the_gathered_shuffle(bn, teacher):
    gather, load = (ranks(2, _steps, shuffle, bn, teacher)[0] for shuffle in ("gather", "load"))
    first = 1 if bn and teacher else 3  # how long nothing can differ
    for a, b in list(zip(gather, load))[:first]:
        assert (
            b[1]["contrast"] == pytest.approx(a[1]["contrast"], rel=1e-12)
            and np.abs(a[2] - b[2]).max() < 1e-12
        )
        if not bn:  # distillation is a mean over images, in whatever order
            assert b[0] == pytest.approx(a[0], rel=1e-12) and b[1]["distill"] == pytest.approx(
                a[1]["distill"], rel=1e-12
            )
    # The student's statistics of view B are those of other images: the one difference.
    if bn and teacher:
        assert load[0][1]["distill"] != pytest.approx(gather[0][1]["distill"], rel=1e-6)
        assert load[0][1]["distill"] == pytest.approx(gather[0][1]["distill"], rel=0.2)


# ---- the whole command


@pytest.mark.parametrize("n", [1, 2])
def test_moco_alone_trains_to_the_last_bit_alike(folder, tmp_path, n):
    for how in ("gather", "load"):
        ranks(
            n,
            _train,
            tiny(folder, tmp_path, "run.max_steps=14", f"run.name={how}", f"bn.shuffle={how}"),
        )
    assert _differences(tmp_path / "gather", tmp_path / "load", n) == []
    ranks(n, _train, tiny(folder, tmp_path, "run.max_steps=2", "run.name=still", "bn.shuffle=off"))
    assert losses(tmp_path / "still")[1] != losses(tmp_path / "load")[1]


def test_the_switch_of_old_configurations_is_read():
    of = lambda value: config.validate(
        {"run": {"name": "a"}, "data": {"train": "x"}, "bn": {"shuffle": value}}, "test"
    )
    assert [of(v).bn.shuffle for v in (True, False, "load")] == ["gather", "off", "load"]
    assert "shuffle: 'off'" in config.dump(of(False))
    with pytest.raises(UserError, match="bn.shuffle.*gather.*load.*off"):
        of("sometimes")
