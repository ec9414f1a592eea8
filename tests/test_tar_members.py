"""Tars as other tools write and rewrite them: read as WebDataset reads them, or refused by name; and
an index that is never of another tar."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_sets import one_sentence
from PIL import Image

from fastdisco import data
from fastdisco.config import UserError
from fastdisco.data import check, name_classes, pack, shards, tar_index


@pytest.fixture(scope="module")
def jpg():
    """Image number i, of one size in bytes."""

    def image(i):
        out = io.BytesIO()
        Image.new("RGB", (16, 16), (i * 7 % 256, i * 31 % 256, 9)).save(out, format="BMP")
        return out.getvalue()

    return image


def write(path, members, form=tarfile.GNU_FORMAT):
    """A tar of [(name, content)]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as t:
        for name, content in members:
            add(t, name, content)
    return path


def add(t, name, content):
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), 1234567890
    t.addfile(info, io.BytesIO(content))


def numbered(jpg, labels, extension="bmp"):
    out = []
    for i, label in enumerate(labels):
        out += [(f"{i:04}.{extension}", jpg(i)), (f"{i:04}.cls", b"%d" % label)]
    return out


def refuse(path, *parts):
    with pytest.raises(UserError) as e:
        data.listing(path)
    one_sentence(e, *map(str, parts))


# --- the index and its tar


def test_a_tar_that_was_rebuilt_with_the_same_size_is_indexed_again_and_that_is_said(
    jpg, tmp_path, capsys
):
    tar = write(tmp_path / "a.tar", numbered(jpg, [0, 1, 2, 0]))
    assert data.listing(tmp_path).labels.tolist() == [0, 1, 2, 0]
    size = tar.stat().st_size
    write(tar, numbered(jpg, [2, 2, 1, 0]))
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 1000))
    assert tar.stat().st_size == size
    assert data.listing(tmp_path).labels.tolist() == [2, 2, 1, 0]
    assert "a.tar is not as it was indexed" in capsys.readouterr().out
    # Nor is anything said or written where nothing changed.
    before = tar_index.path_of(tar).stat().st_mtime_ns
    data.listing(tmp_path)
    assert not capsys.readouterr().out.strip()
    assert tar_index.path_of(tar).stat().st_mtime_ns == before
    # A tar that grew is another one, too.
    write(tar, numbered(jpg, [1] * 9))
    assert data.listing(tmp_path).labels.tolist() == [1] * 9
    # Its headers tell another tar whose time was set back.
    stat = tar.stat()
    members = [(name.replace("0", "7", 1), content) for name, content in numbered(jpg, [2] * 9)]
    write(tar, members)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data.listing(tmp_path).labels.tolist() == [2] * 9


def test_a_start_reads_a_bounded_part_of_each_tar(jpg, tmp_path, monkeypatch):
    tar = write(tmp_path / "a.tar", numbered(jpg, range(200)))
    data.listing(tmp_path)
    reads = []
    real = Path.open

    def spying(path, *args, **kw):
        file = real(path, *args, **kw)
        if path == tar:
            read = file.read
            file = type(
                "Spy",
                (),
                {
                    "__enter__": lambda self: self,
                    "__exit__": lambda self, *a: None,
                    "seek": lambda self, *a: None,
                    "read": lambda self, n: reads.append(n) or read(n),
                },
            )()
        return file

    monkeypatch.setattr(tar_index, "scan", lambda *a: pytest.fail("the whole tar was read"))
    index = tar_index.read(tar)
    assert index is not None
    assert tar_index.fits(tar, index)
    monkeypatch.setattr(Path, "open", spying)
    tar_index.headers(tar, index.lines)
    assert reads == [512] * tar_index.PROBES


def test_the_data_check_finds_a_class_that_was_changed_in_place_with_the_time_set_back(
    jpg, tmp_path
):
    tar = write(tmp_path / "a.tar", numbered(jpg, [0, 1, 2, 0]))
    assert data.listing(tmp_path).labels.tolist() == [0, 1, 2, 0]
    stat, content = tar.stat(), tar.read_bytes()
    first = content.index(b"0000.cls") + 512
    tar.write_bytes(content[:first] + b"2" + content[first + 1 :])
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError) as e:
        check.check([tmp_path], threads=1)
    one_sentence(e, "a.tar", "index does not fit")


def test_an_index_of_the_first_version_is_read_or_written_anew_silently(jpg, tmp_path, capsys):
    def older(tar):
        """What the first version wrote."""
        about, rows = tar_index.about(tar), tar_index.rows_of(tar)
        head = {"fastdisco index": 1, "bytes": about["bytes"], "sha256": about["sha256"]}
        text = "\n".join([json.dumps(head), *(row.line() for row in rows)]) + "\n"
        tar_index.path_of(tar).write_text(text)
        return text

    tar = write(tmp_path / "foreign/a.tar", numbered(jpg, [0, 1, 2, 0]))
    found = data.listing(tar.parent)
    older(tar)
    # Rebuilt under the older version's eyes.
    write(tar, numbered(jpg, [2, 2, 1, 0]))
    capsys.readouterr()
    assert data.listing(tar.parent).labels.tolist() == [2, 2, 1, 0]
    assert not capsys.readouterr().out.strip()
    assert tar_index.about(tar)["fastdisco index"] == 2

    pack.pack(tar.parent, tmp_path / "packed")
    want = data.listing(tmp_path / "packed")
    manifest = tmp_path / "packed/manifest.json"
    content = json.loads(manifest.read_text())
    del content["checksum"]
    manifest.write_text(json.dumps(content, indent=1))
    text = older(tmp_path / "packed/000000.tar")
    assert data.listing(tmp_path / "packed").fingerprint == want.fingerprint != found.fingerprint
    assert (tmp_path / "packed/000000.index").read_text() == text
    assert pack.pack(tar.parent, tmp_path / "packed") == {tmp_path / "packed": content}


def test_no_flipped_bit_of_an_index_or_manifest_goes_unseen(jpg, tmp_path):
    write(tmp_path / "src/a.tar", numbered(jpg, [0, 1, 2, 0, 1]))
    pack.pack(tmp_path / "src", tmp_path / "packed")
    want = {}
    for root in (tmp_path / "src", tmp_path / "packed"):
        want[root] = data.listing(root)
    rng = np.random.default_rng(0)
    for path in (
        tmp_path / "packed/000000.index",
        tmp_path / "packed/manifest.json",
        tmp_path / "src/a.index",
    ):
        whole = path.read_bytes()
        for at in rng.integers(0, len(whole), 60).tolist():
            bad = bytearray(whole)
            bad[at] ^= 1 << int(rng.integers(0, 7))
            path.write_bytes(bad)
            try:
                found = data.listing(path.parent)
            except UserError:
                continue
            # White space of JSON may change without harm.
            was = want[path.parent]
            assert found.fingerprint == was.fingerprint, (path, at)
            assert found.classes == was.classes, (path, at)
        path.write_bytes(whole)


def test_what_is_left_of_a_manifest_is_no_other_tools(jpg, tmp_path):
    write(tmp_path / "src/a.tar", numbered(jpg, range(4)))
    pack.pack(tmp_path / "src", tmp_path / "packed")
    for left in ({}, {"version": 1}, [], {"shard_bytes": 1, "classes": [], "tars": {}}):
        (tmp_path / "packed/manifest.json").write_text(json.dumps(left))
        refuse(tmp_path / "packed", "manifest.json", "damaged")
    (tmp_path / "src/manifest.json").write_text("{}")
    assert len(data.listing(tmp_path / "src").files) == 4


def test_a_packed_tar_of_another_pack_is_refused_also_with_its_own_index(jpg, tmp_path):
    write(tmp_path / "src/a.tar", numbered(jpg, range(6)))
    for seed in (0, 1):
        pack.pack(tmp_path / "src", tmp_path / str(seed), seed=seed)
    shutil.copy(tmp_path / "1/000000.tar", tmp_path / "0/000000.tar")
    refuse(tmp_path / "0", "000000.tar", "copy the tar again")
    shutil.copy(tmp_path / "1/000000.index", tmp_path / "0/000000.index")
    refuse(tmp_path / "0", "000000.tar", "SHA-256", "copy the whole folder")


def test_a_tar_that_a_pattern_means_twice_and_one_that_is_gone_are_refused(jpg, tmp_path):
    for i in (1, 10):
        write(tmp_path / f"x-{i}.tar", [(f"{i}.bmp", jpg(i))])
    assert len(data.listing(tmp_path / "x-1*.tar").files) == 2
    for i in range(2, 10):
        write(tmp_path / f"x-{i}.tar", [(f"{i}.bmp", jpg(i))])
    refuse(tmp_path / "x-{1..10}*.tar", "x-10.tar twice", "each tar once")
    (tmp_path / "y-1.tar").symlink_to("gone")
    refuse(tmp_path / "y-*.tar", "y-1.tar", "cannot be read")


def test_pipes_in_place_of_a_tar_or_an_index_are_refused(jpg, tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    refuse(tmp_path, "a.tar", "no regular file")
    (tmp_path / "a.tar").unlink()
    write(tmp_path / "a.tar", numbered(jpg, range(3)))
    os.mkfifo(tmp_path / "a.index")
    refuse(tmp_path, "a.index", "remove it")


def test_a_packed_set_may_be_copied_with_new_times(jpg, tmp_path, capsys):
    write(tmp_path / "src/a.tar", numbered(jpg, range(6)))
    pack.pack(tmp_path / "src", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    capsys.readouterr()
    files = {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    assert data.listing(tmp_path / "b").fingerprint == data.listing(tmp_path / "a").fingerprint
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == files
    assert not capsys.readouterr().out.strip()


# --- what tar writers produce


def test_files_that_macos_puts_beside_tars_are_no_tars(jpg, tmp_path):
    write(tmp_path / "a.tar", numbered(jpg, range(3)))
    (tmp_path / "._a.tar").write_bytes(b"\0\5\x16\7")
    assert len(data.listing(tmp_path).files) == 3


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_what_tools_leave_in_a_tar_is_passed_over(jpg, form, tmp_path):
    around = [
        (".DS_Store", b"x"),
        ("__info__.json", b"{}"),
        ("README", b"x"),
        ("README.md", b"x"),
        ("set/LICENSE.txt", b"x"),
        ("__MACOSX/set/0000.bmp", b"x"),
        ("set/Thumbs.db", b"x"),
    ]
    members = []
    for i in range(4):
        # macOS puts a file of its own before each one, also between those of a sample.
        for extension, content in (("BMP", jpg(i)), ("CLS", b"%d\n" % i), ("json", b"{}")):
            members += [(f"set/._{i:04}.{extension}", b"\0\5\x16\7")]
            members += [(f"./set/{i:04}.{extension}", content)]
    write(tmp_path / "a.tar", around + members + [("set/.hidden.bmp", b"x")], form)
    found = data.listing(tmp_path)
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert [found.read(i) for i in range(4)] == [jpg(i) for i in range(4)]


def test_names_with_dots_are_read_as_webdataset_reads_them(jpg, tmp_path):
    members = [
        ("v1.0/1.input.bmp", jpg(1)),
        ("v1.0/1.cls", b"3"),
        ("v1.0/2.bmp", jpg(2)),
        ("v1.0/2.mask.png", b"x"),
        ("v1.0/2.target.cls", b"5"),
        ("v1.0/3.seg.json", b"{}"),
        ("v1.0/3.cls", b"4"),
        ("v1.0/3.2021.05.bmp", jpg(3)),
    ]
    write(tmp_path / "a.tar", members)
    found = data.listing(tmp_path)
    assert found.labels.tolist() == [3, 5, 4]
    assert [found.read(i) for i in range(3)] == [jpg(1), jpg(2), jpg(3)]


def archive(jpg):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        add(t, "n1_1.bmp", jpg(1))
    return out.getvalue()


def link(name, to, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info.tobuf()


REFUSED = {
    "appended": ([("1.bmp", 1), ("2.bmp", 2), ("1.bmp", 3)], ["1.bmp twice", "unpack it"]),
    "appended after others, ./": ([("1.bmp", 1), ("2.bmp", 2), ("./1.bmp", 3)], ["./1.bmp twice"]),
    "beside each other": ([("1.bmp", 1), ("1.bmp", 2)], ["1.bmp twice", "would be lost"]),
    "two classes": (
        [("1.bmp", 1), ("1.cls", b"0"), ("2.bmp", 1), ("1.cls", b"1")],
        ["1.cls twice"],
    ),
    "two cases": ([("1.bmp", 1), ("1.BMP", 2)], ["1.bmp and 1.BMP"]),
    "apart": (
        [("1.bmp", 1), ("2.bmp", 2), ("1.cls", b"0"), ("2.cls", b"0")],
        ["1.cls", "does not follow", "--sort=name"],
    ),
    "apart, class first": (
        [("1.cls", b"0"), ("2.cls", b"0"), ("1.bmp", 1), ("2.bmp", 2)],
        ["1.bmp", "does not follow", "--sort=name"],
    ),
    "kaggle": ([(f"dog.{i}.bmp", i) for i in range(9)], ["dog.0.bmp", "first dot", "rename"]),
    "kaggle, mixed": (
        [(f"{x}.{i}.bmp", i) for i in range(9) for x in ("cat", "dog")],
        ["cat.1.bmp", "first dot"],
    ),
    "input and target": ([("1.input.bmp", 1), ("1.target.png", 2)], ["1.input.bmp", "one image"]),
    "several classes": (
        [("1.bmp", 1), ("1.a.cls", b"0"), ("1.b.cls", b"1")],
        ["a.cls, b.cls", "name the right one"],
    ),
    "no image": ([("1.bmp", 1), ("2.gif", 2), ("2.cls", b"1")], ["2.gif", "one image", "--delete"]),
    "metadata of another name": ([("1.bmp", 1), ("all.json", b"{}")], ["all.json", "--delete"]),
    "control character": ([("1\n2.bmp", 1)], ["1\\n2.bmp", "control character", "rename"]),
    "nothing": ([("README", b"x"), (".DS_Store", b"x")], ["empty"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_vanish_is_refused_with_tar_member_and_remedy(case, jpg, tmp_path):
    members, parts = REFUSED[case]
    made = [(name, jpg(x) if isinstance(x, int) else x) for name, x in members]
    refuse(write(tmp_path / "a.tar", made), tmp_path / "a.tar", *parts)
    assert not (tmp_path / "a.index").exists()


def test_a_tar_of_tars_is_refused_with_the_remedy(jpg, tmp_path):
    write(tmp_path / "a.tar", [(f"n{i}.tar", archive(jpg)) for i in (4, 7)])
    refuse(tmp_path / "a.tar", "a.tar", "n4.tar", "archive itself", "unpack both")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, b"M"])
def test_members_whose_bytes_are_elsewhere_are_refused(kind, jpg, tmp_path):
    whole = write(tmp_path / "a.tar", [("1.bmp", jpg(1))]).read_bytes()
    header = link("2.bmp", "1.bmp", kind)
    (tmp_path / "a.tar").write_bytes(header + whole)
    refuse(tmp_path / "a.tar", "a.tar", "2.bmp", "volume" if kind == b"M" else "--dereference")


def test_what_follows_the_end_of_a_tar_is_refused(jpg, tmp_path):
    parts = [write(tmp_path / f"{i}.tar", [(f"{i}.bmp", jpg(i))]).read_bytes() for i in range(2)]
    a = tmp_path / "a.tar"
    a.write_bytes(b"".join(parts))
    refuse(a, "a.tar", f"byte {len(parts[0])}", "-xif")
    # A single bit at the very end, behind more zeros than one read.
    a.write_bytes(parts[0] + bytes(3 << 20) + b"\1")
    refuse(a, "a.tar", f"byte {len(parts[0]) + (3 << 20)}")
    a.write_bytes(parts[0] + bytes(3 << 20))
    assert data.listing(a).files == ["a.tar/0.bmp"]


def test_tars_by_the_tar_command_are_read_or_refused(jpg, tmp_path):
    if not shutil.which("tar"):
        pytest.skip("tar: not installed")
    run = lambda *args: subprocess.run(["tar", *map(str, args)], cwd=tmp_path, check=True)
    src = tmp_path / "src"
    src.mkdir()
    for i in range(4):
        (src / f"{i}.bmp").write_bytes(jpg(i))
        (src / f"{i}.cls").write_bytes(b"%d" % i)
    (tmp_path / "tars").mkdir()
    a = tmp_path / "tars/a.tar"
    run("--sort=name", "-cf", a, "-C", src, ".")
    assert data.listing(a).labels.tolist() == [0, 1, 2, 3]
    run("-rf", a, "-C", src, "./2.bmp")
    refuse(a, "2.bmp twice")
    os.link(src / "3.bmp", src / "4.bmp")
    run("--sort=name", "-cf", a, "-C", src, ".")
    refuse(a, "4.bmp", "--hard-dereference")
    run("--sort=name", "--hard-dereference", "-cf", a, "-C", src, ".")
    (src / "4.cls").write_bytes(b"4")
    run("--sort=name", "--hard-dereference", "-cf", a, "-C", src, ".")
    assert data.listing(a).labels.tolist() == [0, 1, 2, 3, 4]


# --- sorted data without classes


def test_tars_of_one_class_each_without_classes_are_refused_by_their_names(jpg, tmp_path, capsys):
    sets = {
        # ImageNet's archive, unpacked once.
        "imagenet": [[f"{c}_{i * 7}.bmp" for i in range(30)] for c in ("n014", "n021", "n100")],
        "folders": [[f"{c}/{i:03}.bmp" for i in range(30)] for c in ("cat", "dog")],
        "one": [[f"./{c}/{i:03}.bmp" for c in ("cat", "dog", "fox") for i in range(30)]],
    }
    for name, tars in sets.items():
        for k, members in enumerate(tars):
            write(tmp_path / name / f"{k}.tar", [(m, jpg(i)) for i, m in enumerate(members)])
        found = data.listing(tmp_path / name)
        with pytest.raises(UserError) as e:
            shards.refuse_sorted(found)
        one_sentence(e, str(tmp_path / name), "names", "sorted by class", "fastdisco data pack")
    pack.pack(tmp_path / "folders", tmp_path / "remedy")
    capsys.readouterr()
    shards.refuse_sorted(data.listing(tmp_path / "remedy"))
    assert not capsys.readouterr().out.strip()
    # The tars' names alone prove nothing, but are said.
    for name in ("cat", "dog"):
        write(tmp_path / f"plain/{name}.tar", [(f"{i:03}.bmp", jpg(i)) for i in range(30)])
    shards.refuse_sorted(data.listing(tmp_path / "plain"))
    out = capsys.readouterr().out
    assert "cat, dog" in out
    assert "fastdisco data pack" in out


def test_names_that_count_are_no_classes(jpg, tmp_path, capsys):
    sets = {
        "shards": [[f"shard-{k:03}_{i:04}.bmp" for i in range(30)] for k in range(3)],
        "thousands": [[f"{k:03}/{k * 30 + i:05}.bmp" for k in range(3) for i in range(30)]],
        "plain": [[f"{k * 30 + i:05}.bmp" for i in range(30)] for k in range(3)],
        "one name": [[f"img_{k * 30 + i:05}.bmp" for i in range(30)] for k in range(3)],
        "mixed": [[f"{('cat', 'dog')[i * 7 % 31 % 2]}_{i}.bmp" for i in range(90)]],
    }
    for name, tars in sets.items():
        for k, members in enumerate(tars):
            write(tmp_path / name / f"x-{k}.tar", [(m, jpg(i)) for i, m in enumerate(members)])
        shards.refuse_sorted(data.listing(tmp_path / name))
    assert not capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "names, series",
    [
        (["xaa", "xab"], True),
        (["a", "b", "c"], True),
        (["s-00", "s-01", "s-02"], True),
        (["7"], True),
        (["y", "z"], True),
        (["xaz", "xba"], True),
        (["xa", "xc"], False),
        (["cat", "dog"], False),
        (["dig", "dog"], False),
        (["n014", "n021"], False),
        (["a1", "b2"], False),
    ],
)
def test_names_of_a_series(names, series):
    assert name_classes.is_series(names) == series
