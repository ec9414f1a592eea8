"""Tars that other tools wrote, and bad ones: indexed at first use, or refused with the remedy."""

import io
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import TAR_MB
from image_sets import CPU, make, one_sentence, places, refuse, stream

from fastdisco import data
from fastdisco.config import UserError
from fastdisco.data import pack, shards, tar_index

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
    pack.pack(tmp_path / "sorted", tmp_path / "remedy", shard_mb=TAR_MB)
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
