"""What the data check says of images whose metadata or ends are strange: the decoder judges, and
only what concerns the pixels counts."""

import io
import logging

import numpy as np
import pytest
from image_sets import CPU
from PIL import Image, PngImagePlugin
from test_check import JPEG, PNG, encoded, zeroed

from fastdisco import data
from fastdisco.data import check

MIB = 2**20


def text(compressed, size=3 * MIB):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * size, zip=compressed)
    return encoded("PNG", pnginfo=info)


def wrong_sum():
    """A PNG whose text has a wrong CRC: a bit that concerns no pixel."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "text of no weight")
    content = encoded("PNG", pnginfo=info)
    at = content.index(b"of no weight")
    return content[:at] + b"O" + content[at + 1 :]


def profile(size=3 * MIB):
    """A PNG with a long colour profile."""
    return encoded("PNG", icc_profile=np.random.default_rng(0).bytes(size))


# A directory that announces 64 entries and ends within the first two.
EXIF = b"Exif\0\0II*\0\x08\0\0\0" + b"\x40\0" + b"\x12\x01\x03\0\xff\xff\xff\x7f" * 2
TRAILER = np.random.default_rng(1).bytes(60_000).replace(b"\xff\xd9", b"..")
GOOD = {
    "text.png": lambda: text(False),
    "packed_text.png": lambda: text(True),
    "profile.png": profile,
    "sum.png": wrong_sum,
    "motion.jpg": lambda: JPEG + TRAILER,
    "trailer.png": lambda: PNG + TRAILER,
    "exif.jpg": lambda: encoded("JPEG", quality=90, exif=EXIF),
    "profile.jpg": lambda: encoded("JPEG", quality=90, icc_profile=TRAILER),
}
BAD = {
    "hole_and_trailer.jpg": (lambda: zeroed(JPEG, 4096, 0.4) + TRAILER, False),
    "half.jpg": (lambda: JPEG[: len(JPEG) // 2], True),
    "half_and_text.png": (lambda: text(False)[: -len(PNG) // 2], True),
}


@pytest.mark.parametrize("fast", [True, False])
def test_only_what_concerns_the_pixels_makes_an_image_bad(tmp_path, fast):
    (tmp_path / "a").mkdir()
    for name, content in GOOD.items():
        (tmp_path / "a" / name).write_bytes(content())
    for name, (content, early) in BAD.items():
        if early or not fast:
            (tmp_path / "a" / f"bad_{name}").write_bytes(content())
    wanted = [f.name for f in sorted((tmp_path / "a").glob("bad_*"))]
    faults = check.check([tmp_path], fast=fast)
    assert sorted(f.name.split("/")[1] for f in faults) == wanted, faults
    # And what is good has its pixels.
    listing = data.listing(tmp_path, "quarantine.txt")
    loader = data.EvalLoader(listing, 240, 224, 8, 1, CPU)
    views = dict(zip((listing.files[i] for i in loader.indices), next(iter(loader)).views[0]))
    for name in ("text", "packed_text", "profile", "sum", "trailer"):
        assert (views[f"a/{name}.png"] == views["a/text.png"]).all(), name
    for name in ("motion", "exif", "profile"):
        assert abs(views[f"a/{name}.jpg"] - views["a/motion.jpg"]).max() < 1, name


def test_too_many_pixels_are_seen_behind_a_long_text(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(text(True))
    assert [f.kind for f in check.check([tmp_path], max_pixels=300 * 240 - 1)] == ["too large"]
    limits = PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS
    assert limits == (MIB, 1024 * MIB // 4 // 3)


def test_what_pillow_says_of_metadata_does_not_reach_the_terminal(tmp_path, recwarn, caplog):
    (tmp_path / "a").mkdir()
    content = encoded("JPEG", exif=EXIF)
    with pytest.warns(UserWarning, match="EXIF"), Image.open(io.BytesIO(content)):
        pass
    (tmp_path / "a/1.jpg").write_bytes(content)
    recwarn.clear()
    assert check.check([tmp_path]) == []
    assert not [w for w in recwarn if "PIL" in w.filename]
    assert not [r for r in caplog.records if r.name.startswith("PIL")]
    assert logging.getLogger("PIL").level == logging.NOTSET


def test_deep_greys_and_lab_are_read_as_the_docs_say(tmp_path, capfd):
    """16 bits become 8 by v / 257, where Pillow's convert("RGB") makes everything above 255 white;
    LAB becomes sRGB, as Pillow converts it."""
    (tmp_path / "a").mkdir()
    grey = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    lab = np.stack([np.full((32, 32), x, np.uint8) for x in (128, 200, 60)], -1)
    Image.fromarray(grey).save(tmp_path / "a/1.png")
    Image.fromarray(grey).save(tmp_path / "a/2.tif")
    Image.fromarray(lab, "LAB").save(tmp_path / "a/3.tif")
    assert check.check([tmp_path]) == check.check([tmp_path], fast=True) == []
    plain = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
    loader = data.EvalLoader(data.listing(tmp_path), 32, 32, 3, 1, CPU, **plain)
    found = next(iter(loader)).views[0] * 255
    for i in (0, 1):
        assert abs(found[i].numpy() - grey / 257).max() < 0.6
    wanted = np.asarray(Image.open(tmp_path / "a/3.tif").convert("RGB"))[0, 0]
    assert abs(found[2, :, 0, 0].numpy() - wanted).max() <= 3
