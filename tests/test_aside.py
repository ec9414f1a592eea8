"""Images that break while a training runs: others take their places, all ranks agree, and a resume
is exact."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as td
from conftest import TAR_MB, ranks, tiny
from image_sets import SMALL, one_sentence
from training import _differences, _fails, _train, losses, metrics, train_a_teacher

from fastdisco import data, models
from fastdisco.common import dist
from fastdisco.config import UserError
from fastdisco.data import decoder, orders, pack, pipelines
from fastdisco.data.aside import Aside, Broken
from fastdisco.run import checkpoint

CPU = torch.device("cpu")
GARBAGE = b"no image at all"


@pytest.fixture
def images(folder, tmp_path):
    """43 images, to be damaged."""
    shutil.copytree(folder / "train", tmp_path / "images/train")
    return data.listing(tmp_path / "images/train")


@pytest.fixture
def tars(folder, tmp_path):
    """The same in several tars."""
    pack.pack(folder / "train", tmp_path / "tars/train", shard_mb=TAR_MB)
    return data.listing(tmp_path / "tars/train")


def loader(listing, limit=0.2, **more):
    return data.TrainLoader(listing, SMALL, 8, 0, 3, 1, 1, CPU, bad_limit=limit, **more)


def damage(listing, indices):
    """Writes garbage over the images, in files or in tars."""
    for i in indices:
        if listing.places is None:
            (listing.root / listing.files[i]).write_bytes(GARBAGE)
        else:
            p = listing.places
            with (listing.root / p.tars[p.tar[i]]).open("r+b") as f:
                f.seek(p.offset[i])
                f.write(b"\0" * int(p.size[i]))


def epoch_order(listing, epoch):
    return orders.order(0, epoch, listing)


# ---- which image takes a place


def test_a_place_gets_a_spare_image_by_its_number(few):
    aside = Aside(few, 0.5)
    used, spare = np.array([4, 9, 2, 7, 5, 0]), np.array([1, 3, 8])
    assert aside.fill(used, spare) is used
    aside.images = {9: "", 5: "", 3: ""}
    # Places 1 and 4 of the two spare images that are left, 1 and 8.
    assert aside.fill(used, spare).tolist() == [4, 8, 2, 7, 1, 0]
    # Without any: half an epoch away, of 7 5 0 4 9 2 those that are not set aside, 7 0 4 2.
    assert aside.fill(used, spare[:0]).tolist() == [4, 0, 2, 7, 7, 0]
    assert used.tolist() == [4, 9, 2, 7, 5, 0]


def test_a_listing_without_what_is_set_aside(few):
    aside = Aside(few._replace(left_out=np.array([4])), 0.5)
    aside.images = {9: "", 2: ""}
    assert aside.without(few._replace(left_out=np.array([4]))).left_out.tolist() == [2, 4, 9]
    assert aside.without(few).fingerprint == few.fingerprint


# ---- a loader


@pytest.mark.parametrize("kind", ["images", "tars"])
def test_a_loader_goes_on_and_a_new_one_at_its_state_gives_the_same(kind, request, capsys):
    listing = request.getfixturevalue(kind)
    batches = loader(listing)
    first = [next(batches) for _ in range(2)]
    order = epoch_order(listing, 0)
    # Places 33 and 38 of 40 in the first epoch; 3 images are not used in it.
    bad = order[[33, 38]].tolist()
    damage(listing, bad)
    rest = list(batches)
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{listing.files[i]} (" in said for i in bad) and "data.bad_limit" in said, said
    seen = torch.cat([b.index for b in first + rest]).numpy().reshape(3, 40)
    want = order[:40].copy()
    want[[33, 38]] = order[40:][[33 % 3, 38 % 3]]
    assert seen[0].tolist() == want.tolist() and not np.isin(seen, bad).any()
    assert sorted(batches.aside.images) == sorted(bad) and all(batches.aside.images.values())

    # At any later step, also where the files are whole again: the list decides, not the disk.
    state = batches.state
    for position in (5, 9):
        again = loader(listing)
        again.state = state | {"position": position}
        for a, b in zip(rest[position - 2 :], again, strict=True):
            assert torch.equal(a.index, b.index) and all(map(torch.equal, a.views, b.views))
        assert again.state == state


def test_without_a_limit_the_first_stops_the_run_as_before(images):
    for limit in (0, 1 / 44):
        batches = loader(images, limit)
        next(batches)
        bad = epoch_order(images, 0)[30]
        damage(images, [bad])
        with pytest.raises(UserError) as e:
            list(batches)
        one_sentence(e, f"unreadable image {images.files[bad]}", "--only", "last checkpoint")
        assert e.value.anywhere and "data.bad_limit" not in str(e.value)
        assert batches.state == batches.position


def test_more_than_the_limit_stops_and_says_so(images):
    batches = loader(images, 2.5 / 43)
    order = epoch_order(images, 0)
    next(batches)
    damage(images, order[[30, 38]])
    for _ in range(5):
        next(batches)
    assert len(batches.aside) == 2
    damage(images, epoch_order(images, 1)[[36]])
    with pytest.raises(UserError) as e:
        list(batches)
    one_sentence(e, "unreadable image", "data.bad_limit allows (2)")


def test_a_tar_that_is_cut_short_or_gone_costs_its_images_alone(tars):
    order, places = epoch_order(tars, 0), tars.places
    # A tar from the middle of the epoch on.
    tar = places.tar[order[25]]
    inside = set(np.flatnonzero(places.tar == tar).tolist())
    whole = (tars.root / places.tars[tar]).read_bytes()
    for damaged in (whole[:2048], None):
        batches = loader(tars, 0.9)
        next(batches)
        path = tars.root / places.tars[tar]
        path.unlink() if damaged is None else path.write_bytes(damaged)
        # New pipelines, as at a chunk's end or a resume.
        batches.position = batches.position
        seen = torch.cat([next(batches).index for _ in range(4)]).tolist()
        set_aside = set(batches.aside.images)
        assert set_aside and set_aside <= inside and not set_aside & set(seen)
        path.write_bytes(whole)


def test_what_can_be_read_again_is_tried_again_once(images, monkeypatch):
    """A disk that was away for a moment: DALI failed, and now every image can be read."""
    bad = epoch_order(images, 0)[30]
    batches, whole = loader(images), images.read(int(bad))
    next(batches)
    damage(images, [bad])
    look = decoder.faults

    def mended(listing, indices, device):
        (images.root / images.files[bad]).write_bytes(whole)
        return look(listing, indices, device)

    monkeypatch.setattr(decoder, "faults", mended)
    seen = torch.cat([b.index for b in batches])
    assert bad in seen and batches.state == batches.position == 15


def test_evaluations_still_name_the_image(images):
    damage(images, [17])
    with pytest.raises(UserError, match="unreadable image"):
        list(data.EvalLoader(images, 24, 16, 8, 1, CPU))
    batches = loader(images)
    seen = [i for b in batches.views_of(images.kept, 0) for i in b.index.tolist()]
    assert seen == [i for i in range(43) if i != 17] and list(batches.aside.images) == [17]
    left = data.EvalLoader(batches.remaining, 24, 16, 8, 1, CPU)
    assert [i for b in left for i in b.index.tolist()] == seen


def _cut_under_the_reader(root):
    batches = loader(data.listing(root), 0.9)
    next(batches)
    # DALI reads ahead, and would have the next files mapped.
    time.sleep(0.5)
    for i in epoch_order(batches.listing, 0)[8:40]:
        os.truncate(batches.listing.root / batches.listing.files[i], 0)
    seen = torch.cat([b.index for b in batches])
    return seen.tolist(), sorted(batches.aside.images)


def test_files_that_are_cut_while_they_are_read_end_no_process(images):
    """A mapped file would, by SIGBUS."""
    ((seen, aside),) = ranks(1, _cut_under_the_reader, images.root)
    assert len(seen) == 14 * 8 and aside and not set(seen[40:]) & set(aside)


# ---- several ranks


def _each_finds_its_own(root):
    td.init_process_group("gloo")
    batches = loader(data.listing(root))
    rank = dist.rank()
    batches.aside.images = {10 + rank: f"found by {rank}"}
    batches.aside._news = dict(batches.aside.images)
    batches.agree()
    found = dict(batches.aside.images)
    # Nobody has found more.
    batches.agree()
    batches.aside._news = {20 + i: "more" for i in range(4 * rank)}
    try:
        batches.agree()
    except UserError as e:
        return found, str(e)
    return found, ""


def test_ranks_agree_and_stop_together_above_the_limit(images):
    (a, told), (b, same) = ranks(2, _each_finds_its_own, images.root)
    assert a == b == {10: "found by 0", 11: "found by 1"} and list(a) == [10, 11]
    assert told == same == ""
    for found in ranks(3, _each_finds_its_own, images.root):
        assert "data.bad_limit allows (8)" in found[1] and "fastdisco data check" in found[1]


def _pairs(root):
    """Views are permuted over ranks.  One image is damaged, and rank 0 alone fails at another."""
    td.init_process_group("gloo")
    listing = data.listing(root)
    batches = loader(listing, permuted=True)
    order, run = epoch_order(listing, 0), pipelines.run
    # Both of the second batch of 16.
    damaged, failed = order[30], order[20]

    def fails(pipe, listing, images, i, *rest):
        here = images[i * batches.batch : (i + 1) * batches.batch]
        if failed in here and dist.rank() == 0:
            raise Broken({int(failed): "away for a moment"}, UserError("unreadable image"))
        return run(pipe, listing, images, i, *rest)

    pipelines.run = fails
    if dist.rank() == 0:
        damage(listing, [damaged])
    dist.barrier()
    first, *rest = (next(batches) for _ in range(5))
    assert not np.isin(first.index, [damaged, failed]).any()
    found = dict(batches.aside.images)
    # Another loader that knows of them from the first batch on gives the same.
    again = loader(listing, permuted=True)
    again.state = {"position": 1, "aside": found}
    for a in rest:
        b = next(again)
        assert torch.equal(a.index, b.index)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    return sorted(found), sorted(map(int, (damaged, failed)))


def test_ranks_that_share_the_views_of_an_image_agree_at_once(images):
    for found, expected in ranks(2, _pairs, images.root):
        assert found == expected


def _train_on_breaking(args, root, when):
    """Trains; rank 0 damages images before its batch number `when`."""
    step = data.TrainLoader.__next__

    def breaking(self):
        if self.position == when and not (Path(root) / "done").exists():
            # All ranks have come here, and none has read what comes 3 batches later.
            dist.barrier()
            if dist.rank() == 0:
                listing = self.listing
                order = orders.order(self.seed, 0, listing)
                damage(listing, order[[33, 38, 39]])
                (Path(root) / "done").touch()
            dist.barrier()
        return step(self)

    data.TrainLoader.__next__ = breaking
    _train(args)


@pytest.mark.parametrize(
    "kind, shuffle", [("images", "gather"), ("images", "load"), ("tars", "gather")]
)
def test_two_ranks_train_on_while_data_break_and_resume_exactly(
    kind, shuffle, request, tmp_path, folder
):
    """Damaged in the first epoch (5 steps each) and met on both ranks; resumed from step 7, once
    with the damaged images and once with whole ones."""
    listing = request.getfixturevalue(kind)
    broken = tmp_path / "broken"
    shutil.copytree(listing.root, broken / "train")
    train_a_teacher(folder, tmp_path, steps=1)
    args = lambda out, root: tiny(
        *(folder, tmp_path / out, f"data.train={root}", "data.bad_limit=0.2", "run.max_steps=14"),
        *("checkpoint.every=7", "log.every=3", "eval.every=5", "eval.bank=20"),
        *(f"teacher.file={tmp_path}/teacher", "teacher.arch=test_resnet"),
        f"bn.shuffle={shuffle}",
    )
    ranks(2, _train_on_breaking, args("whole", broken / "train"), broken, 1)
    saved = models.read(checkpoint.last(tmp_path / "whole/tiny") / "state.pt")["data"]
    assert saved["position"] == 14 and len(saved["aside"]) == 3, saved
    assert metrics(tmp_path / "whole/tiny")[-2]["data/set_aside"] == 3
    for name, root in (("parts", broken / "train"), ("mended", listing.root)):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        run = tmp_path / name / "tiny/checkpoints"
        (run / "last").write_text("step_00000007")
        shutil.rmtree(run / "step_00000014")
        ranks(2, _train, args(name, root))
        logged = (3, 6, 7, 9, 12, 14)
        assert _differences(tmp_path / "whole/tiny", tmp_path / name / "tiny", 2, logged) == []


def test_a_run_stops_above_the_limit_with_code_2_and_goes_on_with_a_higher_one(
    images, folder, tmp_path
):
    args = lambda limit: tiny(
        folder, tmp_path, f"data.train={images.root}", "run.max_steps=4", f"data.bad_limit={limit}"
    )
    damage(images, epoch_order(images, 0)[:2])
    code, says = ranks(1, _fails, args(0.03))[0]
    assert code == 2 and "unreadable image" in says and "data.bad_limit allows (1)" in says, says
    ranks(1, _train, args(0.05))
    assert sorted(losses(tmp_path / "tiny")) == [1, 2, 3, 4]


def test_a_teacher_is_recorded_without_what_breaks_and_replayed(images, folder, tmp_path):
    train_a_teacher(folder, tmp_path, steps=1)
    damage(images, [17])
    args = lambda *more: tiny(
        *(folder, tmp_path, f"data.train={images.root}", "run.max_steps=9", "data.bad_limit=0.1"),
        *(f"teacher.file={tmp_path}/teacher", "teacher.arch=test_resnet", "teacher.cache=record"),
        *(f"teacher.cache_folder={tmp_path}/cache", "teacher.cache_rounds=2", *more),
    )
    ranks(2, _train, args())
    saved = models.read(checkpoint.last(tmp_path / "tiny") / "state.pt")["data"]
    assert list(saved["aside"]) == [17], saved
    # Another run that replays is told which are not there.
    code, says = ranks(1, _fails, [*args("run.name=other"), "teacher.cache=replay"])[0]
    assert code == 2 and images.files[17] in says, says
    json.dumps(saved["aside"])
