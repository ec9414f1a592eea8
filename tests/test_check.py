"""The data check: every kind of bad image found and named, good ones not, the quarantine, and a run
that a broken file stops and mends."""

import io
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from conftest import ranks, run, tiny
from image_sets import CPU, make, one_sentence, stream
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from training import SCRIPT, _told, losses

from fastdisco import cli, data
from fastdisco.commands import train
from fastdisco.config import UserError
from fastdisco.data import check, decoder, pack, tar_index


def encoded(fmt, size=(300, 240), photo="astronaut.png", **kw):
    out = io.BytesIO()
    Image.open(Path(skimage.data.__file__).parent / photo).convert("RGB").resize(size).save(
        out, fmt, **kw
    )
    return out.getvalue()


def zeroed(content, n=2000, at=0.5):
    at = int(at * len(content))
    return content[:at] + bytes(n) + content[at + n :]


JPEG = encoded("JPEG", quality=90)
PNG = encoded("PNG")
WEBP = encoded("WEBP")
BAD = {  # name -> bytes, kind, whether headers and ends tell
    "empty.jpg": (b"", "empty", True),
    "text.jpg": (b"<html>404 not found</html>", "not an image", True),
    "tiny.png": (b"\n", "not an image", True),
    "animation.jpg": (encoded("GIF"), "not an image", True),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated", True),
    "end.jpg": (JPEG[:-2], "truncated", True),
    "head.jpg": (JPEG[:100], "truncated", True),
    "half.png": (PNG[: len(PNG) // 2], "truncated", True),
    "half.webp": (WEBP[: len(WEBP) // 2], "truncated", True),
    "half.bmp": (encoded("BMP")[:9000], "damaged", False),
    "hole.jpg": (zeroed(JPEG), "damaged", False),
    "hole_progressive.jpg": (
        zeroed(encoded("JPEG", quality=90, progressive=True)),
        "damaged",
        False,
    ),
    "hole.png": (zeroed(PNG), "damaged", False),
    "bit.png": (PNG[:9000] + bytes([PNG[9000] ^ 4]) + PNG[9001:], "damaged", False),
    "hole.tiff": (zeroed(encoded("TIFF", compression="tiff_lzw")), "damaged", False),
    "huge.png": (None, "too large", True),
}


def good(root):
    """Images that are read although they are strange."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    noise = lambda *shape: Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(40, 50).save(root / "gray.jpg")
    noise(40, 50, 3).convert("CMYK").save(root / "cmyk.jpg")
    noise(40, 50, 4).save(root / "alpha.png")
    noise(1, 1, 3).save(root / "dot.png")
    noise(40, 50, 3).convert("P").save(root / "palette.png")
    noise(40, 50, 3).convert("1").save(root / "bits.png")
    noise(40, 50, 3).save(root / "turned.jpg", exif=exif)
    text = PngInfo()
    text.add_text("comment", "x" * 9000)
    # Libpng warns of the profile.
    noise(40, 50, 3).save(root / "text.png", pnginfo=text, icc_profile=b"no profile" * 20)
    noise(400, 3, 3).save(root / "column.bmp")
    noise(40, 50, 3).save(root / "x.tif")
    (root / "named_wrongly.jpg").write_bytes(PNG)
    for name, content in (
        ("progressive.jpg", encoded("JPEG", progressive=True)),
        ("x.webp", WEBP),
        ("x.ppm", encoded("PPM")),
        ("x.jp2", encoded("JPEG2000")),
        ("trailer.jpg", JPEG + b"trailer" * 9),
    ):
        (root / name).write_bytes(content)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Good and bad images in two classes, the pixel limit at 300 x 240."""
    root = tmp_path_factory.mktemp("mixed")
    good(root / "a")
    good(root / "b")
    for i, (name, (content, _, _)) in enumerate(BAD.items()):
        if content is None:
            Image.new("RGB", (400, 300)).save(root / "ab"[i % 2] / f"bad_{name}")
        else:
            (root / "ab"[i % 2] / f"bad_{name}").write_bytes(content)
    (root / "a/bad_gone.jpg").symlink_to("nowhere")
    return root


LIMIT = 300 * 240


@pytest.mark.parametrize("fast", [True, False])
def test_bad_images_are_found_by_kind_and_good_ones_are_not(mixed, fast, tmp_path):
    bad = check.check([mixed], fast=fast, out=tmp_path, max_pixels=LIMIT)
    found = {f.name[len("a/bad_") :]: f.kind for f in bad if "/bad_" in f.name}
    assert [f for f in bad if "/bad_" not in f.name] == []
    assert found == {n: kind for n, (_, kind, early) in BAD.items() if early or not fast} | {
        "gone.jpg": "unreadable"
    }
    assert all(f.detail and "\n" not in f.detail for f in bad)
    listing = data.listing(mixed)
    assert all(listing.files[f.index] == f.name for f in bad)
    report = json.loads((tmp_path / f"check-{mixed.name}.json").read_text())
    assert (
        report["images"] == report["looked_at"] == len(listing.files)
        and report["fast"] is fast
        and sum(report["kinds"].values()) == len(bad)
    )
    lines = (tmp_path / "quarantine.txt").read_text().splitlines()
    assert [x.split("\t")[0] for x in lines] == sorted(f"{mixed.resolve()}/{f.name}" for f in bad)
    if not fast:  # what is left can be read, and so can the same in tars, where the same is bad
        left = data.listing(mixed, tmp_path / "quarantine.txt")
        assert (
            len(left.kept) == 32
            and sum(len(b.index) for b in data.EvalLoader(left, 16, 16, 8, 1, CPU)) == 32
        )
        (mixed / "a/bad_gone.jpg").unlink()
        pack.pack(mixed, tmp_path / "tars", shard_mb=0.5)
        (mixed / "a/bad_gone.jpg").symlink_to("nowhere")
        again = check.check([tmp_path / "tars"], max_pixels=LIMIT)
        assert sorted(f.kind for f in again) == sorted(
            kind for kind in found.values() if kind != "unreadable"
        )
        tars = data.listing(tmp_path / "tars", "quarantine.txt")
        assert len(tars.kept) == 32 and next(make(tars)).index.numel() == 8
        pack.pack(tmp_path / "tars", tmp_path / "moved", seed=3)  # the quarantine goes along
        moved = data.listing(tmp_path / "moved", "quarantine.txt")
        assert moved.left_out.tolist() == tars.left_out.tolist()


def test_damage_that_leaves_a_readable_file_is_mostly_seen():
    """Zeros over a part of a JPEG, as a lost block of a disk leaves them, are seen by what libjpeg
    says; a single wrong bit mostly is not."""
    d, rng = decoder.Decoder(CPU, 40, 1), np.random.default_rng(0)
    photos = [
        encoded("JPEG", photo=p, quality=q)
        for p in ("astronaut.png", "coffee.png")
        for q in (75, 95)
    ]
    assert d.faults(photos, complaints=True) == {}
    holes = [zeroed(p, 4096, at) for p in photos for at in rng.uniform(0.2, 0.7, 10)]
    assert (
        len(d.faults(holes, complaints=True)) >= 36 and len(d.faults(holes, complaints=False)) < 10
    )


def test_a_good_set_leaves_no_quarantine_and_code_0(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "d")
    sources = [str(tmp_path / "d/train"), str(tmp_path / "d/val")]
    assert cli.main(["data", "check", *sources]) == 0
    assert "43 images, all good" in " ".join(capsys.readouterr().out.split())
    assert (
        not list(tmp_path.rglob("quarantine.txt")) and len(list(tmp_path.rglob("check.json"))) == 2
    )
    (tmp_path / "d/val/class1").rename(tmp_path / "d/val/other")
    assert cli.main(["data", "check", *sources]) == 2
    error = capsys.readouterr().err
    assert (
        "classes are not those of" in error and "class1, other" in error and error.count("\n") == 1
    )


def test_a_whole_check_replaces_the_quarantine_and_others_add(folder, tmp_path, capsys):
    root = tmp_path / "train"
    shutil.copytree(folder / "train", root)
    listing = data.listing(root)
    whole = {i: listing.read(i) for i in (2, 5, 30)}
    names = lambda: [x.split("\t")[0] for x in (root / "quarantine.txt").read_text().splitlines()]
    (root / listing.files[2]).write_bytes(zeroed(whole[2], 300, 0.6))
    assert cli.main(["data", "check", str(root)]) == 2 and names() == [listing.files[2]]
    (root / listing.files[5]).write_bytes(b"")
    assert cli.main(["data", "check", str(root), "--fast"]) == 2 and names() == [
        listing.files[2],
        listing.files[5],
    ]
    (root / listing.files[30]).write_bytes(b"")
    (root / listing.files[5]).write_bytes(whole[5])
    assert (
        cli.main(["data", "check", str(root), "--only", listing.files[30], listing.files[7]]) == 2
    )
    assert names() == [listing.files[i] for i in (2, 5, 30)]
    assert cli.main(["data", "check", str(root)]) == 2 and names() == [
        listing.files[i] for i in (2, 30)
    ]
    for i in (2, 30):
        (root / listing.files[i]).write_bytes(whole[i])
    assert cli.main(["data", "check", str(root)]) == 0 and names() == []
    assert cli.main(["data", "check", str(root), "--only", "class0/nope.jpg"]) == 2
    assert "class0/nope.jpg" in capsys.readouterr().err


def test_a_quarantine_leaves_out_without_renumbering(folder, tmp_path):
    root = tmp_path / "train"
    shutil.copytree(folder / "train", root)
    before = data.listing(root)
    (root / "quarantine.txt").write_text(
        f"# by hand\n{before.files[7]}\n{before.files[20]}\tugly\n"
    )
    left = data.listing(root, "quarantine.txt")
    assert (
        left.left_out.tolist() == [7, 20]
        and left.fingerprint == before.fingerprint
        and left.files == before.files
    )
    a, b = stream(make(before)), stream(make(left))
    assert not {7, 20} & {i for _, i in b[1]} and all(
        a[0][k] == b[0][k] for k in a[0].keys() & b[0].keys()
    )
    first = next(n for n, (_, i) in enumerate(a[1]) if i in (7, 20))
    # Until the first image that is left out, the order is what it was.
    assert b[1][:first] == a[1][:first]
    assert torch.cat([x.index for x in data.EvalLoader(left, 16, 16, 8, 1, CPU)]).tolist() == [
        i for i in range(43) if i not in (7, 20)
    ]
    for text, absolute, parts in (
        ("".join(f"{f}\n" for f in before.files), False, ("every image",)),
        (None, True, ("cannot be read",)),
    ):
        (root / "quarantine.txt").unlink(missing_ok=True)
        if text:
            (root / "quarantine.txt").write_text(text)
        with pytest.raises(UserError) as e:
            data.listing(root, (root if absolute else Path()) / "quarantine.txt")
        one_sentence(e, "quarantine.txt", *parts)
    (tmp_path / "q.txt").write_text(
        f"{root.resolve()}/{before.files[3]}\tbad\n/other/data/{before.files[4]}\tbad\n"
    )
    assert data.listing(root, tmp_path / "q.txt").left_out.tolist() == [3]


def test_a_folder_that_cannot_be_written_asks_for_another(folder, tmp_path, monkeypatch):
    def denied(*args):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as m:
        m.setattr(check, "write_whole", denied)
        with pytest.raises(UserError) as e:
            check.check([folder / "train"], fast=True)
    one_sentence(e, str(folder / "train"), "--out", "data.quarantine")


def test_damaged_tars_are_told_by_their_sums_and_indices(folder, tmp_path, capsys):
    pack.pack(folder / "train", tmp_path / "tars", shard_mb=0.04)
    listing = data.listing(tmp_path / "tars")
    at = int(listing.places.offset[np.flatnonzero(listing.places.tar == 1)[0]])
    with (tmp_path / "tars/000001.tar").open("r+b") as f:
        f.seek(at + 700)
        f.write(b"\x55")
    # An index that is whole, but of other places.
    tar = tmp_path / "tars/000002.tar"
    rows, sha256 = tar_index.rows_of(tar), tar_index.about(tar)["sha256"]
    rows[0] = rows[0]._replace(offset=1024)
    text = tar_index.index_text(tar_index.header(tar, rows, sha256), rows)
    tar_index.path_of(tar).write_text(text)
    capsys.readouterr()
    assert cli.main(["data", "check", str(tmp_path / "tars")]) == 2
    error = capsys.readouterr().err
    assert (
        "000001.tar: its bytes are not those that were packed (SHA-256)" in error
        and "000002.tar: its index does not fit" in error
    )
    assert error.count("\n") == 1 and "000000" not in error and "000003" not in error


def test_a_file_that_breaks_during_training_stops_it_and_the_named_command_mends_it(
    folder, tmp_path
):
    """After the third step a file is damaged; the run names it, the checkpoint is whole, and after
    the named command the same one goes on."""
    shutil.copytree(folder, tmp_path / "d")
    args = lambda steps: tiny(
        tmp_path / "d", tmp_path, f"run.max_steps={steps}", f"data.val={folder / 'val'}"
    )
    ranks(1, train.main, [str(a) for a in args(3)])
    listing = data.listing(tmp_path / "d/train")
    bad = listing.files[next(make(listing, start=4)).index[0]]  # of the fifth step
    (tmp_path / "d/train" / bad).write_bytes((tmp_path / "d/train" / bad).read_bytes()[:500])
    text = run(sys.executable, SCRIPT, *args(6), code=2)
    assert f"unreadable image {bad}" in text and "Traceback" not in text
    command = text.split("`")[1]
    assert command == f"fastdisco data check {shlex.quote(str(tmp_path / 'd/train'))} --only {bad}"
    assert (tmp_path / "tiny/checkpoints/last").read_text() == "step_00000003"
    assert cli.main(shlex.split(command)[1:]) == 2
    text = ranks(1, _told, args(6))[0]
    assert (
        "continuing after step 3" in text
        and "1 of them is left out by the quarantine" in text
        and "done: 6 steps" in text
    )
    assert sorted(losses(tmp_path / "tiny")) == list(range(1, 7))
