"""Tars: packing them, what is in them, and that a training sees in them what it sees in the
folder."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ranks, tiny
from PIL import Image
from test_data import CPU, PLACEMENTS, SMALL, make, one_sentence, serialised, stream
from test_train import losses, metrics

from fastdisco import cli, data
from fastdisco.commands import train
from fastdisco.config import UserError
from fastdisco.data import loader, pack, shards, tar_index

MB = 30 / 1024  # tars of 30 KiB: the 43 images fill several


@pytest.fixture(scope="module")
def few(folder):
    return data.listing(folder / "train")


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    dst = tmp_path_factory.mktemp("packed") / "train"
    pack.pack(folder / "train", dst, shard_mb=MB)
    return data.listing(dst)


@pytest.fixture(scope="module")
def usual(packed):
    return stream(make(packed))


def refuse(function, *args, parts=(), **kw):
    with pytest.raises(UserError) as e:
        function(*args, **kw)
    one_sentence(e, *map(str, parts))


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
            about["bytes"] == len(content) <= MB * 2**20
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
            pack.pack(few.root, tmp_path / "a", shard_mb=MB)
    begun = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert "manifest.json" not in begun and "000002.tar" in begun and len(begun) < len(whole)
    refuse(data.listing, tmp_path / "a", parts=[tmp_path / "a", "not finished", "data pack"])
    refuse(pack.pack, few.root, tmp_path / "a", 1, MB, parts=["another seed", "new folder"])
    (tmp_path / "a/000001.index").unlink()  # killed between a tar and its index
    (tmp_path / "a/000002.part").write_bytes(b"half a tar")
    before = (tmp_path / "a/000000.tar").stat().st_mtime_ns
    pack.pack(few.root, tmp_path / "a", shard_mb=MB)
    assert (
        bytes_of(tmp_path / "a") == whole
        and (tmp_path / "a/000000.tar").stat().st_mtime_ns == before
    )
    # Nothing left to do.
    again = [
        list(pack.pack(few.root, root, shard_mb=MB).values())
        for root in (tmp_path / "a", packed.root)
    ]
    assert again[0] == again[1] and bytes_of(packed.root) == whole
    pack.pack(few.root, tmp_path / "b", seed=1, shard_mb=MB)
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
            monkeypatch.setattr(*(loader, "CHUNK", 1) if case == "chunks" else (shards, "OPEN", 1))
        elif case == "folder":
            listing = few
        elif case == "loose":  # another random order of storing, by another seed and size
            pack.pack(few.root, tmp_path / "b", seed=9, shard_mb=2 * MB)
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


def places(sizes, bytes_=1024):
    tar = np.repeat(np.arange(len(sizes)), sizes)
    offset = np.concatenate([np.arange(n) * bytes_ for n in sizes])
    mixed = np.random.default_rng(0).permutation(len(tar))  # the listing's order is not the tars'
    return shards.Places(
        [f"{k}.tar" for k in range(len(sizes))], tar[mixed], offset[mixed], np.full(len(tar), 512)
    )


def test_an_epoch_reads_tar_after_tar_in_short_runs_and_every_epoch_otherwise():
    sizes = (700, 100, 400, 5, 300)
    p = places(sizes)
    n = sum(sizes)
    orders = [shards.order(loader._keys(3, e, n + 6), p) for e in range(40)]
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
    pack.pack(folder / "val", tmp_path / "val", shard_mb=MB)
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


def _train(args):
    assert train.main([str(a) for a in args]) == 0


# --- foreign tars


def foreign(path, samples, **kw):
    """A tar as other tools write it: {name: bytes}, folders and members we do not know among
    them."""
    with tarfile.open(path, "w", **kw) as t:
        folder = tarfile.TarInfo("set")
        folder.type = tarfile.DIRTYPE
        t.addfile(folder)
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1234567890
            t.addfile(info, io.BytesIO(content))


def samples_of(few, indices, labels=True):
    out = {}
    for i in indices:
        stem = f"set.1/{'long' * 40 if i % 7 == 0 else ''}nü{i:04}"
        out |= {f"{stem}.json": b'{"w": 3}', f"{stem}.JPG": few.read(i)}
        if labels:
            out[f"{stem}.cls"] = b"%d\n" % few.labels[i]
    return out


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_foreign_tars_are_indexed_at_first_use(few, form, tmp_path):
    order = np.random.default_rng(3).permutation(43)
    for k in range(4):
        foreign(
            tmp_path / f"train-{k:03}.tar",
            samples_of(few, order[k * 11 : k * 11 + 11]),
            format=form,
        )
    found = data.listing(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"train-{k:03}.{e}" for k in range(4) for e in ("index", "tar")
    ]
    assert found.labels.tolist() == few.labels[order].tolist() and found.classes == ["0", "1", "2"]
    assert all(found.read(i) == few.read(j) for i, j in enumerate(order)) and found.files[
        0
    ].startswith("train-000.tar/set.1/")
    before = (tmp_path / "train-000.index").stat().st_mtime_ns
    assert (
        data.listing(tmp_path).fingerprint == found.fingerprint
        and (tmp_path / "train-000.index").stat().st_mtime_ns == before
    )
    # the same images in the same order as files: the same views
    for i, j in enumerate(order):
        (tmp_path / "f" / str(few.labels[j])).mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / str(few.labels[j]) / f"{i:03}.jpg").write_bytes(few.read(j))
    (tmp_path / "f/list.txt").write_text(
        "".join(f"{few.labels[j]}/{i:03}.jpg {few.labels[j]}\n" for i, j in enumerate(order))
    )
    a, b = (stream(make(x, epochs=2))[0] for x in (found, data.listing(tmp_path / "f/list.txt")))
    assert len(a.keys() & b.keys()) > 60 and all(a[k] == b[k] for k in a.keys() & b.keys())
    with pytest.raises(UserError, match="also folders"):
        data.listing(tmp_path)
    for pattern in ("train-{000..003}.tar", "*.tar", "train-00{0..1}.tar"):
        part = data.listing(tmp_path / pattern)
        assert part.files == found.files[: len(part.files)] and len(part.files) == (
            22 if "1}" in pattern else 43
        )
    assert len(data.listing(tmp_path / "train-002.tar").files) == 11
    refuse(data.listing, tmp_path / "train-{002..005}.tar", parts=["train-004.tar", "no such tar"])


def test_tars_in_a_folder_that_cannot_be_written_are_read_all_the_same(
    few, tmp_path, monkeypatch, capsys
):
    foreign(tmp_path / "a.tar", samples_of(few, range(0, 43, 2)))
    monkeypatch.setattr(
        tar_index, "write_whole", lambda *a: (_ for _ in ()).throw(PermissionError())
    )
    assert len(data.listing(tmp_path).files) == 22 and list(tmp_path.iterdir()) == [
        tmp_path / "a.tar"
    ]
    assert "indexed at every start" in capsys.readouterr().out


def test_tars_sorted_by_class_are_refused_for_training_with_the_remedy(few, tmp_path):
    by_class = np.argsort(few.labels, kind="stable")
    mixed = np.random.default_rng(0).permutation(43)
    tars = {
        "sorted": [by_class[:20], by_class[20:]],
        "one": [by_class],
        "apart": [np.flatnonzero(few.labels == c) for c in range(3)],
        "mixed": [mixed[:20], mixed[20:]],
        "single": [by_class[:14]],
    }
    for name, parts in tars.items():
        (tmp_path / name).mkdir()
        for k, part in enumerate(parts):
            foreign(tmp_path / name / f"{k}.tar", samples_of(few, part))
    foreign(tmp_path / "mixed/2.tar", {})
    refuse(data.listing, tmp_path / "mixed", parts=["2.tar", "empty tar"])
    (tmp_path / "mixed/2.tar").unlink()
    for name in ("sorted", "one", "apart"):
        found = data.listing(tmp_path / name)
        refuse(make, found, parts=["sorted by class", f"fastdisco data pack {tmp_path / name}"])
        assert len(list(data.EvalLoader(found, 8, 8, 43, 1, CPU))) == 1  # evaluation does not mind
    pack.pack(tmp_path / "sorted", tmp_path / "remedy", shard_mb=MB)
    for name in ("mixed", "single", "remedy"):
        next(make(data.listing(tmp_path / name)))


def test_every_share_of_random_sets_is_accepted():
    """The test for order does not refuse a set that was shuffled, however few and uneven its
    samples and classes."""
    rng = np.random.default_rng(0)
    for n, classes, tars in (
        (12, 2, 3),
        (43, 3, 8),
        (300, 100, 4),
        (5000, 1000, 10),
        (5000, 2, 50),
    ):
        for _ in range(40):
            labels = np.sort((rng.random(n) ** 2 * classes).astype(np.int64))
            p = places(np.bincount(rng.integers(0, tars, n), minlength=tars).tolist())
            shards.refuse_sorted(
                data.Listing(Path("x"), Path("x"), [""] * n, rng.permutation(labels), [], p)
            )
            if n > 100:
                rows = np.lexsort((p.offset, p.tar))
                sorted_labels = np.empty(n, np.int64)
                sorted_labels[rows] = labels
                with pytest.raises(UserError):
                    shards.refuse_sorted(
                        data.Listing(Path("x"), Path("x"), [""] * n, sorted_labels, [], p)
                    )


def test_unlabelled_tars(few, tmp_path):
    foreign(tmp_path / "a.tar", samples_of(few, range(20), labels=False))
    found = data.listing(tmp_path)
    assert found.classes == ["unlabelled"] and next(make(found)).label.tolist() == [0] * 8
    foreign(tmp_path / "b.tar", samples_of(few, range(20, 30)))
    refuse(data.listing, tmp_path, parts=["20 of its 30 samples have no class"])


def test_a_bad_tar_is_named_with_the_remedy(few, packed, tmp_path):
    def set_of(content, name="000001.tar", keep=True):
        root = tmp_path / "set"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(packed.root, root)
        if not keep:
            for p in root.iterdir():
                p.suffix == ".tar" or p.unlink()
        (root / name).write_bytes(content) if content is not None else (root / name).unlink()
        return root

    whole = (packed.root / "000001.tar").read_bytes()
    index = (packed.root / "000001.index").read_text()
    tar, again = "000001.tar", "copy"
    refuse(data.listing, set_of(whole[: len(whole) // 2]), parts=[tar, "bytes", again])
    refuse(data.listing, set_of(None), parts=[tar, "missing", again])
    refuse(
        data.listing, set_of(whole, "x.tar"), parts=["x.tar", "not in manifest.json", "move it out"]
    )
    refuse(data.listing, set_of(b"garbage", "000001.index"), parts=["000001.index", "remove"])
    # Whole by its checksum, and still not of that tar.
    about, rows = tar_index.parse(index).about, tar_index.rows_of(packed.root / "000001.tar")
    text = lambda *args: tar_index.index_text(*args).encode()
    shift = [rows[0]._replace(offset=len(whole)), *rows[1:]]
    refuse(
        data.listing,
        set_of(text(about, shift), "000001.index"),
        parts=["000001.index", "does not fit", "remove"],
    )
    refuse(
        data.listing,
        set_of(text(about | {"headers": "0"}, rows), "000001.index"),
        parts=[tar, "headers", "copy"],
    )
    few_rows = tar_index.header(packed.root / "000001.tar", rows[:-1], about["sha256"])
    refuse(
        data.listing,
        set_of(text(few_rows, rows[:-1]), "000001.index"),
        parts=[tar, "samples", "manifest"],
    )
    refuse(data.listing, set_of((packed.root / "000002.tar").read_bytes()), parts=[tar])
    assert data.listing(set_of(whole)).fingerprint == packed.fingerprint
    root = set_of(whole)
    (root / "000001.index").unlink()
    # Indexed again, by the stable indices in it.
    assert data.listing(root).fingerprint == packed.fingerprint
    refuse(data.listing, root / "00000{0..1}.tar", parts=["not 0 to", "whole folder"])

    gz = zlib.compressobj(wbits=31)
    for content, what in (
        (whole[: len(whole) // 2], "truncated"),
        (whole[:700], "truncated"),
        (b"no tar" * 200, "no tar"),
        (b"", "no tar"),
        (gz.compress(whole) + gz.flush(), "compressed"),
        (whole[: -1024 * 10] + b"x" * 10240, "damaged"),
    ):
        if what == "damaged":
            ends = len(whole.rstrip(b"\0")) // 512 * 512 + 512
            content = whole[:ends] + b"x" * 10240
        refuse(data.listing, set_of(content, keep=False), parts=[tar, what])
    for samples, what in (
        ({"a.txt": b"x"}, "one image"),
        ({"a.jpg": b"x", "a.png": b"x"}, "one image"),
        ({"a.jpg": b"x", "a.cls": b"dog"}, "whole number"),
    ):
        foreign(tmp_path / "odd.tar", samples)
        refuse(data.listing, tmp_path / "odd.tar", parts=["odd.tar", what])
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "odd.tar", "w") as t:
        t.addfile(link)
    refuse(data.listing, tmp_path / "odd.tar", parts=["odd.tar", "a.jpg", "link", "dereference"])


@pytest.mark.parametrize("kind", ["cut", "gone", "damaged"])
def test_a_tar_that_breaks_during_training_stops_it_with_names(packed, kind, tmp_path, capfd):
    root = tmp_path / "set"
    shutil.copytree(packed.root, root)
    listing = data.listing(root)
    tar, p = root / "000002.tar", listing.places
    if kind == "cut":
        os.truncate(tar, 5000)
    elif kind == "gone":
        tar.unlink()
    else:
        i = np.flatnonzero((p.tar == 2) & (p.offset > 512))[0]
        with tar.open("r+b") as f:
            f.seek(p.offset[i])
            f.write(bytes(400))
    with pytest.raises(UserError) as e:
        list(make(listing))
    one_sentence(
        e,
        str(root),
        "000002.tar",
        "same command",
        *() if kind == "gone" else ("data check", "--only"),
    )
    assert e.value.anywhere


# --- CIFAR


def archive(path, files):
    with tarfile.open(path, "w:gz") as t:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))


def cifar10(change=None):
    rng = np.random.default_rng(0)
    names = [
        b"airplane",
        b"automobile",
        b"bird",
        b"cat",
        b"deer",
        b"dog",
        b"frog",
        b"horse",
        b"ship",
        b"truck",
    ]
    # As it was in 2009.
    dump = lambda x: pickle.dumps(x, protocol=2).replace(
        b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    )
    batch = lambda n: {
        b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
        b"labels": rng.integers(0, 10, n).tolist(),
    }
    batches = {f"data_batch_{i}": batch(4 + i) for i in range(1, 6)} | {"test_batch": batch(6)}
    return batches, {k: dump(v) for k, v in batches.items()} | {
        "batches.meta": dump({b"label_names": names}),
        "readme.html": b"x",
    } | (change or {})


def test_cifar_archives_are_packed_without_loss(tmp_path):
    batches, files = cifar10()
    archive(tmp_path / "cifar-10-python.tar.gz", files)
    assert (
        cli.main(["data", "pack", str(tmp_path / "cifar-10-python.tar.gz"), str(tmp_path / "c")])
        == 0
    )
    five = [batches[f"data_batch_{i}"] for i in range(1, 6)]
    want = np.concatenate([part[b"data"] for part in five]).reshape(-1, 3, 32, 32)
    labels_of_five = [label for part in five for label in part[b"labels"]]
    for part, pixels, labels in (
        ("train", want, labels_of_five),
        (
            "val",
            batches["test_batch"][b"data"].reshape(-1, 3, 32, 32),
            batches["test_batch"][b"labels"],
        ),
    ):
        found = data.listing(tmp_path / "c" / part)
        assert found.labels.tolist() == labels and found.classes[9] == "truck"
        for i, x in enumerate(pixels):
            image = Image.open(io.BytesIO(found.read(i)))
            assert image.format == "PNG" and np.array_equal(np.asarray(image).transpose(2, 0, 1), x)
        views = next(
            iter(data.EvalLoader(found, 32, 32, len(pixels), 1, CPU, mean=(0,) * 3, std=(1,) * 3))
        ).views[0]
        assert torch.equal((views * 255).round().byte(), torch.from_numpy(pixels))
    pack.pack(tmp_path / "cifar-10-python.tar.gz", tmp_path / "j", jpeg=95)
    assert data.listing(tmp_path / "j/val").read(0)[:3] == b"\xff\xd8\xff"
    refuse(pack.pack, tmp_path / "c/val", tmp_path / "k", jpeg=95, parts=["--jpeg"])
    rng = np.random.default_rng(1)
    part = lambda n: pickle.dumps(
        {
            b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            b"fine_labels": list(range(n)),
            b"coarse_labels": [0] * n,
        }
    )
    meta = pickle.dumps({b"fine_label_names": [b"c%d" % i for i in range(100)]})
    archive(
        tmp_path / "cifar-100-python.tar.gz", {"train": part(20), "test": part(9), "meta": meta}
    )
    pack.pack(tmp_path / "cifar-100-python.tar.gz", tmp_path / "h")
    assert (
        data.listing(tmp_path / "h/train").labels.tolist() == list(range(20))
        and len(data.listing(tmp_path / "h/val").classes) == 100
    )


class Evil:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


def test_an_evil_cifar_archive_runs_nothing(tmp_path):
    mark = tmp_path / "mark"

    bad = {
        "system": pickle.dumps({b"data": Evil(os.system, f"touch {mark}")}, 2),
        "eval": pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')"), 2),
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.",
        "numpy": pickle.dumps(Evil(np.fromfile, str(mark)), 2),
        "codec": pickle.dumps(Evil(__import__("_codecs").encode, "x" * 9, "zip"), 2),
        "cut": cifar10()[1]["data_batch_2"][:-500],
        "objects": pickle.dumps(
            {b"data": np.array([[None] * 3072] * 6, object), b"labels": [0] * 6}, 2
        ),
        "floats": pickle.dumps({b"data": np.zeros((6, 3072)), b"labels": [0] * 6}, 2),
        "shape": pickle.dumps({b"data": np.zeros((6, 100), np.uint8), b"labels": [0] * 6}, 2),
        "labels": pickle.dumps(
            {b"data": np.zeros((6, 3072), np.uint8), b"labels": [0, 1, 2, 3, 4, 10]}, 2
        ),
        "list": pickle.dumps([1], 2),
        "text": b"not a pickle",
    }
    for name, content in bad.items():
        archive(tmp_path / "cifar-10-python.tar.gz", cifar10({"data_batch_2": content})[1])
        refuse(
            pack.pack,
            tmp_path / "cifar-10-python.tar.gz",
            tmp_path / name,
            parts=["data_batch_2", "is not CIFAR's"],
        )
        assert not mark.exists() and not (tmp_path / name).exists()
    link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as t:
        t.addfile(link)
    refuse(
        pack.pack,
        tmp_path / "cifar-10-python.tar.gz",
        tmp_path / "x",
        parts=["is not cifar-10-python.tar.gz"],
    )
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b garbage")
    refuse(pack.pack, tmp_path / "cifar-10-python.tar.gz", tmp_path / "x", parts=["no tar.gz"])


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
