"""Tars: packing them, what is in them, and that a training sees in them what it sees in the
folder."""

import hashlib
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import TAR_MB, ranks, tiny
from image_sets import CPU, PLACEMENTS, SMALL, make, places, refuse, serialised, stream
from training import _train, losses, metrics

from fastdisco import data
from fastdisco.data import pack, pipelines, shards
from fastdisco.data.orders import _keys


@pytest.fixture(scope="module")
def usual(packed):
    return stream(make(packed))


# --- what is packed


def test_tars_hold_each_image_with_class_and_index_and_the_manifest_counts_them(few, packed):
    manifest = json.loads((packed.root / "manifest.json").read_text())
    seen, order = {}, []
    assert (
        list(manifest["tars"]) == sorted(p.name for p in packed.root.glob("*.tar"))
        and len(manifest["tars"]) > 3
    )
    for name, about in manifest["tars"].items():
        content = (packed.root / name).read_bytes()
        assert (
            about["bytes"] == len(content) <= TAR_MB * 2**20
            and about["sha256"] == hashlib.sha256(content).hexdigest()
        )
        with tarfile.open(packed.root / name) as t:
            parts = {m.name: t.extractfile(m).read() for m in t}
            assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in t} == {(0, 0, 0, 0o644, "")}
        assert about["samples"] * 3 == len(parts)
        for stem in dict.fromkeys(n.split(".")[0] for n in parts):
            index = int(parts[f"{stem}.idx"])
            seen[index] = parts[f"{stem}.jpg"], int(parts[f"{stem}.cls"])
            order.append(index)
    assert seen == {
        i: ((few.root / f).read_bytes(), few.labels[i]) for i, f in enumerate(few.files)
    }
    assert (
        manifest["samples"] == 43
        and manifest["classes"] == few.classes
        and manifest["class_counts"] == np.bincount(few.labels).tolist()
    )
    # Random over all, not within a tar.
    assert order != sorted(order) and abs(np.corrcoef(order, np.arange(43))[0, 1]) < 0.5
    assert packed.labels.tolist() == few.labels.tolist() and packed.classes == few.classes
    assert all(packed.read(i) == (few.root / f).read_bytes() for i, f in enumerate(few.files))


def test_the_same_seed_gives_the_same_bytes_also_after_a_kill_and_another_seed_does_not(
    few, packed, tmp_path, monkeypatch
):
    bytes_of = lambda root: {p.name: p.read_bytes() for p in root.iterdir()}
    whole = bytes_of(packed.root)
    members, member = 0, pack._member

    def killed(*args):
        nonlocal members
        members += 1
        if members == 3 * 30:
            raise KeyboardInterrupt
        return member(*args)

    with monkeypatch.context() as m:
        m.setattr(pack, "_member", killed)
        with pytest.raises(KeyboardInterrupt):
            pack.pack(few.root, tmp_path / "a", shard_mb=TAR_MB)
    begun = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert "manifest.json" not in begun and "000002.tar" in begun and len(begun) < len(whole)
    refuse(data.listing, tmp_path / "a", parts=[tmp_path / "a", "not finished", "data pack"])
    refuse(pack.pack, few.root, tmp_path / "a", 1, TAR_MB, parts=["another seed", "new folder"])
    (tmp_path / "a/000001.index").unlink()  # killed between a tar and its index
    (tmp_path / "a/000002.part").write_bytes(b"half a tar")
    before = (tmp_path / "a/000000.tar").stat().st_mtime_ns
    pack.pack(few.root, tmp_path / "a", shard_mb=TAR_MB)
    assert (
        bytes_of(tmp_path / "a") == whole
        and (tmp_path / "a/000000.tar").stat().st_mtime_ns == before
    )
    # Nothing left to do.
    again = [
        list(pack.pack(few.root, root, shard_mb=TAR_MB).values())
        for root in (tmp_path / "a", packed.root)
    ]
    assert again[0] == again[1] and bytes_of(packed.root) == whole
    pack.pack(few.root, tmp_path / "b", seed=1, shard_mb=TAR_MB)
    assert (tmp_path / "b/000000.tar").read_bytes() != whole["000000.tar"]


def test_tars_can_be_packed_again_and_list_files_packed(few, packed, tmp_path):
    pack.pack(packed.root, tmp_path / "again", seed=5)
    again = data.listing(tmp_path / "again")
    assert (
        len(again.places.tars) == 1
        and all(again.read(i) == packed.read(i) for i in range(43))
        and again.labels.tolist() == packed.labels.tolist()
    )
    (tmp_path / "some").mkdir()
    for name in ("b c.jpg", "a.jpg", "d.jpg"):
        shutil.copy(few.root / few.files[0], tmp_path / "some" / name)
    (tmp_path / "list.txt").write_text(
        "# my images\nsome/b c.jpg dog\n\nsome/a.jpg cat\nsome/d.jpg\tdog\n"
    )
    listed = data.listing(tmp_path / "list.txt")
    assert (listed.files, listed.labels.tolist(), listed.classes) == (
        ["some/b c.jpg", "some/a.jpg", "some/d.jpg"],
        [1, 0, 1],
        ["cat", "dog"],
    )
    assert sorted(next(make(listed, batch=3)).index.tolist()) == [0, 1, 2]
    pack.pack(tmp_path / "list.txt", tmp_path / "tars")
    assert data.listing(tmp_path / "tars").labels.tolist() == [1, 0, 1] and data.listing(
        tmp_path / "tars"
    ).classes == ["cat", "dog"]
    (tmp_path / "list.txt").write_text("some/a.jpg 2\nsome/d.jpg 0\n")
    assert data.listing(tmp_path / "list.txt").labels.tolist() == [2, 0] and data.listing(
        tmp_path / "list.txt"
    ).classes == ["0", "1", "2"]


def test_nothing_leads_out_of_the_folder(few, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(few.root, src)
    (src / "class0/link.jpg").symlink_to(src / few.files[3])
    refuse(
        pack.pack, src, tmp_path / "dst", parts=["class0/link.jpg", "link", "put the file itself"]
    )
    (src / "class0/link.jpg").unlink()
    refuse(pack.pack, src, src / "dst", parts=[src / "dst", "lies in", "outside"])
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("kept")
    refuse(pack.pack, src, tmp_path / "full", parts=["not empty", "new folder"])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(pack, "_tar", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            pack.pack(src, tmp_path / "dst")
    (tmp_path / "dst/000000.part").symlink_to(tmp_path / "precious")
    pack.pack(src, tmp_path / "dst")
    assert (tmp_path / "precious").read_text() == "kept" and not (
        tmp_path / "dst/000000.tar"
    ).is_symlink()
    (src / "away").symlink_to(tmp_path / "full")
    for line, what in (
        ("../precious 0", "leads out"),
        (f"{tmp_path}/precious 0", "leads out"),
        ("class0/../../x.jpg 0", "leads out"),
        ("away/x.jpg 0", "leads out"),
        ("alone", "write both"),
        ("class0/000.jpg 0\nclass0/000.jpg 1", "twice"),
        ("# none", "no image"),
    ):
        (src / "list.txt").write_text(line + "\n")
        refuse(data.listing, src / "list.txt", parts=[src / "list.txt", what])


# --- reading them


@pytest.mark.parametrize(
    "case", ["folder", "batch", "threads", "accumulate", "chunks", "open", "ranks", "loose"]
)
def test_views_are_those_of_the_folder_whatever_the_reading(
    few, packed, usual, case, tmp_path, monkeypatch
):
    found = {}
    listing, change = packed, {}
    if case == "ranks":
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            part, _ = stream(make(packed, batch=4))
            # Equal steps, no image on two ranks.
            assert len(part) == 3 * 5 * 4 and not part.keys() & found.keys()
            found |= part
    else:
        if case in ("chunks", "open"):
            monkeypatch.setattr(
                *(pipelines, "CHUNK", 1) if case == "chunks" else (shards, "OPEN", 1)
            )
        elif case == "folder":
            listing = few
        elif case == "loose":  # another random order of storing, by another seed and size
            pack.pack(few.root, tmp_path / "b", seed=9, shard_mb=2 * TAR_MB)
            listing = data.listing(tmp_path / "b")
        else:
            change = dict(
                batch=dict(batch=5), threads=dict(threads=2), accumulate=dict(batch=4, accumulate=2)
            )[case]
        found, _ = stream(make(listing, **change))
    both = found.keys() & usual[0].keys()
    assert len(both) >= 0.8 * len(usual[0])
    assert all(found[k] == usual[0][k] for k in both)
    if case in ("threads", "accumulate", "chunks", "open", "ranks"):
        assert found.keys() == usual[0].keys()


@pytest.mark.parametrize("opened", [1, 512])
def test_a_position_set_later_continues_the_stream(packed, usual, opened, monkeypatch):
    monkeypatch.setattr(shards, "OPEN", opened)
    assert list(stream(make(packed, start=7))[1]) == usual[1][7 * 8 :]
    loader_ = make(packed)
    for position in (14, 0, 5, 9, 10):
        loader_.position = position
        batch = next(loader_)
        want = usual[1][position * 8 : position * 8 + 8]
        assert batch.index.tolist() == [i for _, i in want] and batch.label.tolist() == [
            packed.labels[i] for _, i in want
        ]
        assert [b"".join(v[i].numpy().tobytes() for v in batch.views) for i in range(8)] == [
            usual[0][k] for k in want
        ]


def test_an_epoch_reads_tar_after_tar_in_short_runs_and_every_epoch_otherwise():
    sizes = (700, 100, 400, 5, 300)
    p = places(sizes)
    n = sum(sizes)
    orders = [shards.order(_keys(3, e, n + 6), p) for e in range(40)]
    first, pairs = [], np.zeros(700)
    for o in orders:
        assert sorted(o.tolist()) == list(range(n))
        tar, offset = p.tar[o], p.offset[o] // 1024
        cuts = np.flatnonzero(np.diff(tar)) + 1
        assert len(cuts) == 4  # each tar once, whole
        first.append(tar[0])
        whole = offset[tar == 0]
        broken = np.flatnonzero(np.diff(whole) != 1)
        # Runs of eight that follow each other on disk.
        assert 700 / 8 - 6 <= len(broken) + 1 <= 700 / 8 + 2
        assert abs(np.corrcoef(whole, np.arange(700))[0, 1]) < 0.5
        pairs[whole[:-1][np.diff(whole) == 1]] += 1
    assert len({tuple(o) for o in orders}) == 40 and len(set(first)) == 5
    # Whom an image stays beside differs by epoch: 7 of 8 times its neighbour.
    assert pairs[:-1].max() < 40 and pairs[:-1].min() > 20


def test_few_tars_are_open_at_a_time(packed, monkeypatch):
    p = places([10] * 50)
    listing = data.Listing(packed.root, packed.root, [""] * 500, np.zeros(500, np.int64), ["a"], p)
    in_order = shards.reading_order(listing, np.arange(500))
    monkeypatch.setattr(shards, "OPEN", 7)
    assert (
        shards.at_once(listing, in_order, 10) == 70 and shards.at_once(listing, in_order, 64) == 64
    )
    assert shards.at_once(listing, in_order[:70], 10) == 70
    # A batch at least.
    assert shards.at_once(listing, np.random.default_rng(0).permutation(500), 100) == 100


def test_evaluation_reads_tars_as_it_reads_folders(few, packed, monkeypatch):
    indices = np.array([5, 3, 40, 3, 0, 12, 42, 7])
    want = list(data.EvalLoader(few, 24, 16, 3, 1, CPU, indices))
    for opened in (1, 512):
        monkeypatch.setattr(shards, "OPEN", opened)
        found = list(data.EvalLoader(packed, 24, 16, 3, 1, CPU, indices))
        assert [len(b.index) for b in found] == [3, 3, 2]
        for a, b in zip(want, found):
            assert (
                torch.equal(a.index, b.index)
                and torch.equal(a.label, b.label)
                and torch.equal(a.views[0], b.views[0])
            )
    rows = shards.reading_order(packed, packed.kept)
    assert sorted(rows.tolist()) == list(range(43)) and rows.tolist() != list(range(43))
    assert (np.diff(packed.places.tar[rows]) >= 0).all()


def test_a_run_on_tars_resumes_exactly_and_evaluates_as_the_folder(folder, packed, tmp_path):
    pack.pack(folder / "val", tmp_path / "val", shard_mb=TAR_MB)
    args = lambda out, steps: [
        *tiny(folder, out),
        f"data.train={packed.root}",
        f"data.val={tmp_path / 'val'}",
        f"run.max_steps={steps}",
    ]
    for out, steps in (("whole", 7), ("parts", 3), ("parts", 7)):
        ranks(1, _train, args(tmp_path / out, steps))
    assert (
        losses(tmp_path / "parts/tiny") == losses(tmp_path / "whole/tiny")
        and len(losses(tmp_path / "whole/tiny")) == 7
    )
    knn = [
        m["eval/knn_top1"]
        for out in ("whole", "parts")
        for m in metrics(tmp_path / out / "tiny")[-1:]
    ]
    assert knn[0] == knn[1] and 0 < knn[0] <= 1


# --- GPU


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_gpu_graphs_of_tars_serialise_and_every_operator_exists_for_its_device(
    name, packed, tmp_path
):
    assert ("readers__Webdataset", "cpu") in serialised(packed, str(tmp_path), PLACEMENTS[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLACEMENTS)
def test_gpu_views_of_tars_are_those_of_the_folder(name, few, packed):
    gpu = torch.device("cuda", 0)
    # Of one image: one decoder each.
    a, b = (
        stream(data.TrainLoader(x, SMALL[:1], 1, 0, 3, 1, 1, gpu, placement=PLACEMENTS[name]))
        for x in (few, packed)
    )
    assert a[0] == b[0]
