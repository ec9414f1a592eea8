"""The demo's images: the same for a seed, cut from disjoint cells of photographs that are
installed, never over another's files."""

import hashlib
import json
import socket

import numpy as np
import pytest
from PIL import Image

from fastdisco import cli, data
from fastdisco.config import UserError
from fastdisco.data import demo


def tree(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "a"
    demo.write(root, seed=3, train=4, val=2)
    return root


def test_the_same_bytes_for_a_seed_and_others_for_another(small, tmp_path):
    demo.write(tmp_path / "b", seed=3, train=4, val=2)
    demo.write(tmp_path / "c", seed=4, train=4, val=2)
    assert tree(small) == tree(tmp_path / "b")
    images = [
        {k: v for k, v in tree(root).items() if k.endswith(".jpg")}
        for root in (small, tmp_path / "c")
    ]
    assert images[0].keys() == images[1].keys() and not set(images[0].values()) & set(
        images[1].values()
    )


def test_class_folders_of_32_px_colour_jpegs(small):
    for part, count in (("train", 4), ("val", 2)):
        found = data.listing(small / part)
        assert (
            found.classes == sorted(demo.PHOTOS)
            and np.bincount(found.labels).tolist() == [count] * 18
        )
        for file in found.files:
            with Image.open(small / part / file) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
                image.load()


def test_the_full_set_has_7200_and_1440_images(tmp_path):
    demo.write(tmp_path / "full", seed=1)
    assert [len(data.listing(tmp_path / "full" / part).files) for part in ("train", "val")] == [
        7200,
        1440,
    ]
    bytes_ = list(tree(tmp_path / "full").values())
    assert len(set(bytes_)) > 0.98 * len(bytes_)  # the page and the moon have empty parts


@pytest.mark.parametrize("size", [(640, 640), (640, 318), (426, 640)])
def test_train_and_val_patches_share_no_pixel(size):
    rng = np.random.default_rng(5)
    covered = [np.zeros(size, bool), np.zeros(size, bool)]
    halves = demo.split_cells(size, rng)
    for mask, cells in zip(covered, halves):
        for _ in range(400):
            left, upper, right, lower = demo.draw_box(cells, rng)
            assert right - left == lower - upper and 32 <= right - left <= 80
            assert left >= 0 and right <= size[0] and upper >= 0 and lower <= size[1]
            mask[left:right, upper:lower] = True
    assert not (covered[0] & covered[1]).any()
    cells = (size[0] // 96) * (size[1] // 96)
    assert [len(h) for h in halves] == [cells - max(2, cells // 4), max(2, cells // 4)]
    assert covered[1].sum() > 0.7 * len(halves[1]) * 96**2


def test_a_patch_is_the_photographs_pixels(small):
    """The first training patch found again in the photograph, at the place that the seed's draws
    name."""
    path = demo.find(demo.PHOTOS["coffee"])
    image, rng = demo.photo(path), np.random.default_rng([3, list(demo.PHOTOS).index("coffee")])
    with Image.open(path) as original:
        assert image.size == (640, round(original.height * 640 / original.width))
    cells, _ = demo.split_cells(image.size, rng)
    left, upper, right, lower = demo.draw_box(cells, rng)
    want = np.asarray(
        image.crop((left, upper, right, lower)).resize((32, 32), Image.Resampling.BICUBIC), float
    )
    with Image.open(small / "train" / "coffee" / "0000.jpg") as stored:
        # Of 255: JPEG, and the crop's border.
        assert np.abs(np.asarray(stored, float) - want).mean() < 4


def test_patches_in_a_light_of_their_own_are_the_same_places(small, tmp_path):
    """Each patch is the plain one times three numbers, which the seed draws apart from the places."""
    demo.write(tmp_path / "lit", seed=3, train=4, val=2, light=0.5)
    number = list(demo.PHOTOS).index("coffee")
    draws = np.random.default_rng([3, number, 1])
    for i in range(4):
        gain = np.exp(draws.normal(0, 0.5) + draws.normal(0, 0.25, 3))
        name = f"train/coffee/{i:04}.jpg"
        with Image.open(small / name) as plain, Image.open(tmp_path / "lit" / name) as lit:
            want = np.asarray(plain, float) * gain
            want *= min(1, 255 / want.max())
            # Of 255: both are JPEGs, whose errors grow with the light.
            assert np.abs(np.asarray(lit, float) - want).mean() < 4 * (1 + gain.max())
    with pytest.raises(UserError, match="lit: holds the demo data of another light"):
        demo.write(tmp_path / "lit", seed=3, train=4, val=2)


def test_the_light_has_the_deviation_that_was_asked_for():
    grey = Image.new("RGB", (4, 4), (60, 60, 60))
    rng = np.random.default_rng(0)
    lit = np.stack([np.asarray(demo.relight(grey, 0.4, rng), float) for _ in range(400)])
    assert np.ptp(lit, axis=(1, 2)).max() == 0
    seen = np.log(lit[:, 0, 0] / 60)
    apart = (seen - seen.mean(1, keepdims=True)).std() * np.sqrt(3 / 2)
    assert apart == pytest.approx(0.2, rel=0.1)
    assert seen.mean(1).std() == pytest.approx(np.hypot(0.4, 0.2 / 3**0.5), rel=0.1)


def test_no_light_is_brighter_than_white():
    white = Image.new("RGB", (4, 4), (255, 255, 255))
    rng = np.random.default_rng(0)
    lit = np.stack([np.asarray(demo.relight(white, 0.5, rng)) for _ in range(100)])
    # All three colours would be white where they were clipped one by one.
    assert (lit.min((1, 2, 3)) < 255).all()


def test_only_installed_files_and_no_network(small, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    demo.write(tmp_path / "d", seed=3, train=1, val=1)
    # Known to scikit-image, but not shipped.
    monkeypatch.setitem(demo.PHOTOS, "eagle", "skimage/data/eagle.png")
    with pytest.raises(UserError, match=r"eagle\.png: .*not in the installed skimage"):
        demo.write(tmp_path / "e", seed=3)
    assert not (tmp_path / "e").exists()


def test_what_it_wrote_is_kept(small):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    assert demo.write(small, seed=3, train=4, val=2) == json.loads(
        (small / "demo.json").read_text()
    )
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before


def test_the_manifest_holds_the_photographs_hashes(small):
    manifest = json.loads((small / "demo.json").read_text())
    for name, file in demo.PHOTOS.items():
        assert manifest["photos"][name] == hashlib.sha256(demo.find(file).read_bytes()).hexdigest()


def test_refuses_what_it_did_not_write(small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="mine: not empty and not written by this command"):
        demo.write(tmp_path / "mine")
    with pytest.raises(UserError, match="another seed, train; give a new folder"):
        demo.write(small, seed=4, train=5, val=2)
    demo.write(tmp_path / "g", seed=3, train=1, val=1)
    (tmp_path / "g" / "val" / "moon" / "0000.jpg").unlink()
    with pytest.raises(UserError, match="not those that demo.json"):
        demo.write(tmp_path / "g", seed=3, train=1, val=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_a_killed_run_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    draw, calls = demo.draw_box, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(demo, "draw_box", killed)
    with pytest.raises(KeyboardInterrupt):
        demo.write(tmp_path / "h", train=4, val=2)
    assert not (tmp_path / "h").exists()
    monkeypatch.setattr(demo, "draw_box", draw)
    (tmp_path / "h").mkdir()  # an empty folder will do
    demo.write(tmp_path / "h", train=4, val=2)
    assert len(list((tmp_path / "h").rglob("*.jpg"))) == 18 * 6 and [
        p.name for p in tmp_path.iterdir()
    ] == ["h"]


def test_the_command(small, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").touch()
    assert (
        cli.main(["data", "demo", str(tmp_path / "x")]) == 2
        and "not empty" in capsys.readouterr().err
    )
    assert (
        cli.main(["data", "demo", str(tmp_path / "lit"), "--light", "nan"]) == 2
        and "--light: is nan; give 0 to 2" in capsys.readouterr().err
    )
    assert (
        cli.main(["data", "demo", str(small), "--seed", "3"]) == 2
        and "another train, val" in capsys.readouterr().err
    )
