"""Listings of image folders, what is refused of them, and the errors of images that cannot be
read."""

import hashlib
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from image_sets import CPU, PLAIN, make, one_sentence, pixels
from PIL import Image
from torchvision.transforms import functional as F

from fastdisco import data
from fastdisco.config import Crop, UserError

# --- listings


def test_listing_is_image_folders(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in (
        "b/2.JPG",
        "b/10.jpeg",
        "a/z/deep.png",
        "a/k.webp",
        "a/b.bmp",
        "B/x.tif",
        "b/sub.png/y.ppm",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    want = ImageFolder(tmp_path)
    for name in ("b/readme.txt", "b/.hidden.png", ".git/x.png", "loose.png", "b/.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "b/2.JPG", tmp_path / name)
    (tmp_path / "a/link.png").symlink_to(tmp_path / "b/2.JPG")
    found = data.listing(tmp_path)
    assert found.classes == ["B", "a", "b"] == want.classes
    assert found.files == [
        "B/x.tif",
        "a/b.bmp",
        "a/k.webp",
        "a/link.png",
        "a/z/deep.png",
        "b/10.jpeg",
        "b/2.JPG",
        "b/sub.png/y.ppm",
    ]
    assert found.labels.tolist() == [0, 1, 1, 1, 1, 2, 2, 2] and found.labels.dtype == np.int64
    assert set(want.samples) == {
        (str(tmp_path / f), i) for f, i in zip(found.files, found.labels) if "link" not in f
    }
    # All these formats are read.
    assert sum(len(b.index) for b in data.EvalLoader(found, 8, 8, 3, 1, CPU)) == 8


def test_fingerprint_is_of_names_and_labels(tmp_path):
    for name in ("one/a/1.png", "one/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    one = data.listing(tmp_path / "one")
    assert one.fingerprint == hashlib.sha256(b"a/1.png\0b/2.png\x000 1").hexdigest()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert data.listing(tmp_path / "two").fingerprint == one.fingerprint
    (tmp_path / "two/b/2.png").rename(tmp_path / "two/b/3.png")
    assert data.listing(tmp_path / "two").fingerprint != one.fingerprint


def test_a_wrong_folder_is_refused_with_path_and_remedy(tmp_path):
    def refuse(path, *parts):
        with pytest.raises(UserError) as e:
            data.listing(path)
        one_sentence(e, str(path), *parts)

    refuse(tmp_path / "nope", "no such folder", "give")
    refuse(tmp_path, "no class folders", "put the images")
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    refuse(tmp_path / "1.png", "is a file", "give")
    refuse(tmp_path, "1 images lie in it directly", "one folder per class")
    (tmp_path / "a").mkdir()
    refuse(tmp_path, "not one image", "jpeg")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "1.png", tmp_path / "b")
    refuse(tmp_path, "no image in the class folder a;", "remove or fill")
    (tmp_path / "a").rmdir()
    assert data.listing(tmp_path).files == ["b/1.png"]
    (tmp_path / "c").symlink_to(tmp_path.parent)
    refuse(tmp_path, str(tmp_path / "c"), "link to a folder")
    (tmp_path / "c").rename(tmp_path / "b" / "round")
    refuse(tmp_path, str(tmp_path / "b" / "round"), "link to a folder")


# --- what goes wrong later


def test_too_few_images_for_a_step(few, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as e:
        make(few, batch=8, accumulate=3)
    one_sentence(e, str(few.root), "43 images", "48", "data.batch")


def test_a_crop_larger_than_the_resized_image(few):
    with pytest.raises(UserError) as e:
        data.EvalLoader(few, 32, 40, 4, 1, CPU)
    one_sentence(e, "data.eval_size", "40", "32")


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "gone", "gif"])
def test_an_unreadable_image_is_named(kind, few, tmp_path, capfd):
    root = tmp_path / "train"
    shutil.copytree(few.root, root)
    listing = data.listing(root)
    bad = listing.files[17]
    content = (root / bad).read_bytes()
    if kind == "gone":
        (root / bad).unlink()
    elif kind == "gif":
        Image.new("RGB", (9, 9)).save(root / bad, "GIF")
    else:
        (root / bad).write_bytes(
            {"truncated": content[: len(content) // 2], "text": b"no image at all", "empty": b""}[
                kind
            ]
        )
    for batches in (make(listing, epochs=2), data.EvalLoader(listing, 24, 16, 8, 1, CPU)):
        with pytest.raises(UserError) as e:
            list(batches)
        one_sentence(
            e,
            f"{root}: unreadable image {bad}; replace, or leave out by `fastdisco data check "
            f"{shlex.quote(str(root))} --only {bad}`",
            "continues from the last checkpoint",
        )
        assert e.value.anywhere  # train.py lets the one rank that knows speak


def test_two_unreadable_images_are_both_named(few, tmp_path, capfd):
    root = tmp_path / "train"
    shutil.copytree(few.root, root)
    listing = data.listing(root)
    for i in (3, 5):
        (root / listing.files[i]).write_bytes(b"no image")
    with pytest.raises(UserError) as e:
        list(data.EvalLoader(listing, 24, 16, 8, 1, CPU))
    one_sentence(
        e,
        f"unreadable images {listing.files[3]}, {listing.files[5]};",
        f"--only {listing.files[3]} {listing.files[5]}`",
    )


def test_an_error_that_is_no_files_fault_stays_itself(few):
    class Broken:
        def run(self, stream):
            raise RuntimeError("out of memory")

    train = make(few)
    next(train)
    train._pipes = [Broken()]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(train)


def test_without_dali_both_extras_are_named(few, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError) as e:
        next(make(few))
    one_sentence(e, "fastdisco[cuda13]", "fastdisco[cuda12]")


def test_strange_images_are_read(tmp_path):
    (tmp_path / "c").mkdir()
    rng = np.random.default_rng(0)
    noise = lambda *shape: Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    pictures = {
        "gray.jpg": noise(40, 50),
        "cmyk.jpg": noise(40, 50, 3).convert("CMYK"),
        "alpha.png": noise(40, 50, 4),
        "dot.png": noise(1, 1, 3),
        "strip.png": noise(3, 400, 3),
        "column.jpg": noise(400, 3, 3),
        "palette.png": noise(40, 50, 3).convert("P"),
        "bits.png": noise(40, 50, 3).convert("1"),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / "c" / name)
    (tmp_path / "c/named_wrongly.jpg").write_bytes((tmp_path / "c/dot.png").read_bytes())
    listing = data.listing(tmp_path)
    for batch in make(listing, batch=9, epochs=3):
        assert sorted(batch.index.tolist()) == list(range(9)) and all(
            torch.isfinite(v).all() for v in batch.views
        )
    plain = Crop(size=16, **PLAIN)
    found = dict(
        zip(listing.files, next(iter(data.EvalLoader(listing, 16, 16, 9, 1, CPU))).views[0])
    )
    for name in ("gray.jpg", "alpha.png", "dot.png", "palette.png", "bits.png", "strip.png"):
        want = F.center_crop(F.resize(Image.open(tmp_path / "c" / name).convert("RGB"), 16), 16)
        assert abs(pixels(found[f"c/{name}"], plain) - np.asarray(want, float)).mean() < 0.6, name


def test_exif_orientation_is_ignored(tmp_path):
    (tmp_path / "c").mkdir()
    picture = Image.fromarray(np.arange(30 * 60, dtype=np.uint8).reshape(30, 60) // 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "c/1.jpg", exif=exif, quality=95)
    view = next(iter(data.EvalLoader(data.listing(tmp_path), 30, 30, 1, 1, CPU))).views[0][0]
    want = np.asarray(F.center_crop(Image.open(tmp_path / "c/1.jpg").convert("RGB"), 30), float)
    assert abs(pixels(view, Crop()) - want).max() < 1.5
