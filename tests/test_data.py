"""The data part: listings, order, views hashed from (seed, epoch, image, view) and their likeness
to torchvision, evaluation, errors."""

import collections
import gc
import hashlib
import itertools
import math
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from fastdisco import config, data
from fastdisco.config import Crop, UserError
from fastdisco.data import draws, graph, loader, pipelines
from fastdisco.data.placement import Placement, default_placement

CPU = torch.device("cpu")
PLAIN = dict(flip_p=0, jitter_p=0, gray_p=0, blur_p=0, solarize_p=0)
SMALL = (Crop(size=24), Crop(size=16))
# Lie in scikit-image's package.
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of two photographs, PNG so that every decoder reads the same pixels."""
    root = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(PHOTOS):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.open(Path(skimage.data.__file__).parent / name).convert("RGB").save(
            root / "ab"[i % 2] / f"{i}.png", compress_level=1
        )
    return data.listing(root)


@pytest.fixture(scope="module")
def few(folder):
    """43 small images."""
    return data.listing(folder / "train")


def make(
    listing, crops=SMALL, batch=8, seed=0, epochs=3, accumulate=1, threads=1, device=CPU, start=0
):
    return data.TrainLoader(listing, crops, batch, seed, epochs, accumulate, threads, device, start)


def stream(loader, steps=None):
    """{(epoch, index): bytes of its views} and the order as [(epoch, index)]."""
    seen, order = {}, []
    for batch in loader:
        epoch = (loader.position - 1) // (loader._per_epoch)
        for i, index in enumerate(batch.index.tolist()):
            order.append((epoch, index))
            seen[order[-1]] = b"".join(v[i].cpu().numpy().tobytes() for v in batch.views)
    assert len(seen) == len(order), "an image came twice in an epoch"
    return seen, order


@pytest.fixture(scope="module")
def usual(few):
    return stream(make(few))


# --- the order, and what a view depends on


@pytest.mark.parametrize("case", ["batch", "threads", "accumulate", "chunks", "ranks"])
def test_views_depend_on_seed_epoch_image_and_view_alone(few, usual, case, monkeypatch):
    found = {}
    if case == "ranks":
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            part, _ = stream(make(few, batch=4))
            # Equal steps, no image on two ranks.
            assert len(part) == 3 * 5 * 4 and not part.keys() & found.keys()
            found |= part
    else:
        if case == "chunks":
            monkeypatch.setattr(loader, "CHUNK", 1)  # a pipeline per epoch
        found, _ = stream(
            make(
                few,
                **dict(
                    batch=dict(batch=5),
                    threads=dict(threads=2),
                    accumulate=dict(batch=4, accumulate=2),
                    chunks={},
                )[case],
            )
        )
    both = found.keys() & usual[0].keys()
    assert len(both) >= 0.9 * len(usual[0])
    assert all(found[k] == usual[0][k] for k in both)
    if case != "batch":
        assert found.keys() == usual[0].keys()


@pytest.mark.parametrize("start", [0, 1, 4, 5, 8, 14, 15])
def test_a_restart_continues_the_stream(few, usual, start):
    seen, order = stream(make(few, start=start))
    assert order == usual[1][start * 8 :]
    assert all(seen[k] == usual[0][k] for k in order)


def test_a_position_set_later_continues_the_stream(few, usual):
    """What a resume does, also back and forth within the pipeline that is open."""
    train = make(few)
    for position in (7, 14, 0, 5, 9, 10):
        train.position = position
        batch = next(train)
        want = usual[1][position * 8 : position * 8 + 8]
        assert train.position == position + 1 and batch.index.tolist() == [i for _, i in want]
        assert [b"".join(v[i].numpy().tobytes() for v in batch.views) for i in range(8)] == [
            usual[0][k] for k in want
        ]
    train.position = 15
    assert list(train) == []


def test_a_global_batch_holds_the_same_images_for_any_ranks_and_accumulation(
    few, usual, monkeypatch
):
    want = [sorted(usual[1][i : i + 8]) for i in range(0, len(usual[1]), 8)]
    _, order = stream(make(few, batch=2, accumulate=4))
    assert [sorted(order[i : i + 8]) for i in range(0, len(order), 8)] == want
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        parts.append(stream(make(few, batch=2, accumulate=2))[1])
    assert [
        sorted(parts[0][i : i + 4] + parts[1][i : i + 4]) for i in range(0, len(parts[0]), 4)
    ] == want


def test_every_epoch_has_another_order_and_leaves_out_other_images(usual):
    epochs = [[i for e, i in usual[1] if e == epoch] for epoch in range(3)]
    assert [len(e) for e in epochs] == [40, 40, 40]  # 43 images, batches of 8
    assert len({tuple(e) for e in epochs}) == 3
    assert len({frozenset(range(43)) - frozenset(e) for e in epochs}) == 3


def test_order_is_a_permutation_fixed_for_good():
    assert loader.permutation(3, 1, 10).tolist() == [9, 7, 8, 3, 5, 6, 4, 0, 2, 1]
    assert sorted(loader.permutation(2**32 - 1, 199, 1000).tolist()) == list(range(1000))
    first = np.array([loader.permutation(0, e, 50)[:10] for e in range(400)])
    # Every image is used equally often.
    assert abs(np.bincount(first.ravel(), minlength=50) - 80).max() < 5 * 80**0.5


def test_views_epochs_and_seeds_differ(few, usual):
    same = (Crop(size=24),) * 2
    batch = next(make(few, same))
    assert not any(torch.equal(a, b) for a, b in zip(*batch.views))
    other = next(make(few, same, seed=1))
    places = dict(zip(other.index.tolist(), other.views[0]))
    shared = [(i, v) for i, v in zip(batch.index.tolist(), batch.views[0]) if i in places]
    assert batch.index.tolist() != other.index.tolist() and shared
    assert not any(torch.equal(v, places[i]) for i, v in shared)
    again = [usual[0][e, i] for i in range(43) for e in range(3) if (e, i) in usual[0]]
    assert len(set(again)) == len(again)


def test_position_steps_labels_and_the_end(few):
    train = make(few, batch=4, accumulate=3, epochs=2)
    assert (train.steps_per_epoch, train.position) == (3, 0)
    batches = list(train)
    assert len(batches) == 2 * 3 * 3 == train.position and next(train, None) is None
    for b in batches:
        assert b.label.tolist() == [few.labels[i] for i in b.index.tolist()]
        assert b.label.dtype == b.index.dtype == torch.int64


# --- draws


def twin(seed, epoch, index, view, crop, height, width):
    """The draws of one view by Python's integers and float64: an independent form of draws.py and
    the boxes of graph.py."""
    mask = 2**32 - 1

    def salt(row, column):
        x, wide = 0, 2**64 - 1
        for w in (seed, view, row, column):  # splitmix64
            x = ((x ^ w) + 0x9E3779B97F4A7C15) & wide
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & wide
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB & wide
            x ^= x >> 31
        return (x >> 1) & mask

    def u(row, column=0):
        x = ((index ^ (epoch * 0x9E3779B1 & mask)) + salt(row, column)) & mask
        x = (x ^ (x >> 16)) * 0x85EBCA6B & mask
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & mask
        return x / 2**32

    def within(low, high, row, column=0):
        return low + u(row, column) * (high - low)

    box = None
    for t in range(10):
        area = within(*crop.scale, t) * height * width
        ratio = math.exp(within(math.log(crop.ratio[0]), math.log(crop.ratio[1]), 10 + t))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            box = (
                math.floor(u(20, 0) * (height - h + 1)),
                math.floor(u(20, 1) * (width - w + 1)),
                h,
                w,
            )
            break
    if box is None:
        w, h = width, height
        if width / height < crop.ratio[0]:
            h = round(width / crop.ratio[0])
        elif width / height > crop.ratio[1]:
            w = round(height * crop.ratio[1])
        box = (height - h) // 2, (width - w) // 2, h, w
    b, c, s, hue = crop.jitter
    return dict(
        box=box,
        brightness=within(1 - b, 1 + b, 21, 0),
        contrast=within(1 - c, 1 + c, 21, 1),
        saturation=within(1 - s, 1 + s, 22, 0),
        hue=within(-360 * hue, 360 * hue, 22, 1),
        sigma=within(*crop.blur_sigma, 23, 0),
        light_first=u(23, 1) < 0.5,
        jitter=u(24, 0) < crop.jitter_p,
        gray=u(24, 1) < crop.gray_p,
        blur=u(25, 0) < crop.blur_p,
        flip=u(25, 1) < crop.flip_p,
        solarize=u(26, 0) < crop.solarize_p,
    )


def boxes(path, crops, seed, index, epoch):
    """Boxes [n,V,4] (top, left, height, width) of the graph for one image of many indices."""
    from nvidia.dali import fn, pipeline_def, types

    tries, place = draws.feed(crops, seed, draws.words(np.asarray(index), epoch), "cpu")[:2]

    @pipeline_def
    def pipe():
        encoded = fn.readers.file(files=[str(path)] * len(index))[0]
        fed = [
            fn.external_source(source=itertools.repeat(x), batch=True, dtype=types.FLOAT, ndim=3)
            for x in (tries, place)
        ]
        start, end = graph._boxes(fn.peek_image_shape(encoded, dtype=types.FLOAT)[0:2], *fed, crops)
        return fn.cat(start, end - start, axis=2)

    (box,) = pipe(
        batch_size=len(index), num_threads=1, device_id=None, prefetch_queue_depth=1
    ).run()
    return np.array(box.as_tensor())[:, :, 0]


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    def save(width, height):
        path = tmp_path_factory.mktemp("blank") / "x.png"
        Image.new("RGB", (width, height)).save(path)
        return path

    return save


def test_draws_equal_their_twin(blank):
    crops = (
        Crop(),
        Crop(
            size=96,
            scale=(0.05, 0.3),
            ratio=(0.5, 3.0),
            jitter=(0.8, 0.7, 0.2, 0.3),
            blur_sigma=(0.5, 1.0),
            flip_p=0.2,
            gray_p=0.7,
            solarize_p=0.2,
        ),
    )
    off, numbers, coins = (
        [],
        ("brightness", "contrast", "hue", "sigma"),
        ("light_first", "jitter", "gray", "blur", "flip", "solarize"),
    )
    for (width, height), epoch, seed in (
        ((301, 200), 0, 0),
        ((64, 400), 199, 2**32 - 1),
        ((3000, 2999), 5, 7),
    ):
        index = np.arange(0, 2_000_000_000, 25_000_003)
        box = boxes(blank(width, height), crops, seed, index, epoch)
        for v, crop in enumerate(crops):
            got = draws.of_view(crop, draws.draws(crops, seed, draws.words(index, epoch))[:, v])
            for i in range(len(index)):
                want = twin(seed, epoch, int(index[i]), v, crop, height, width)
                np.testing.assert_allclose(
                    [got[k][i] for k in numbers], [want[k] for k in numbers], rtol=1e-5, atol=1e-5
                )
                np.testing.assert_allclose(
                    got["saturation"][i],
                    0 if want["gray"] else want["saturation"],
                    rtol=1e-5,
                    atol=1e-5,
                )
                assert [got[k][i] for k in coins] == [want[k] for k in coins]
                reach = math.ceil(3 * want["sigma"])
                taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / want["sigma"]) ** 2)
                found = got["across"][i, 0]
                np.testing.assert_allclose(
                    found[found > 0],
                    (taps / taps.sum())[np.float32(taps / taps.sum()) > 0],
                    rtol=1e-4,
                    atol=1e-7,
                )
                assert (got["down"][i, :, 0] == found).all() and (found == found[::-1]).all()
                off.append(abs(box[i, v] - want["box"]).max())
    # Float32 rounds a half to the other side.
    assert max(off) <= 1 and np.mean(np.array(off) > 0) < 0.01


def test_draws_are_uniform_and_independent():
    crops = (Crop(),) * 2
    now, later = (draws.draws(crops, 5, draws.words(np.arange(4000), epoch)) for epoch in (3, 4))
    low, high = draws.ranges(crops)
    scale = lambda d: ((d - low) / (high - low)).reshape(4000, -1)
    u = scale(now)
    # A try's two columns are one draw.
    u = np.concatenate(
        [u[:, np.sort(np.unique(u[0].round(7), return_index=True)[1])], scale(later)[:, -10:]], 1
    )
    assert u.shape[1] >= 2 * 32
    grid = (np.arange(4000) + 0.5) / 4000
    # Kolmogorov-Smirnov, p about 1e-3 for each of some 70.
    assert abs(np.sort(u, 0) - grid[:, None]).max() < 1.95 / 4000**0.5 * 1.1
    for x in (u, (u - 0.5) ** 2):
        r = np.corrcoef(x.T) - np.eye(x.shape[1])
        assert abs(r).max() < 5 / 4000**0.5
    neighbours = [
        np.corrcoef(u[:-k, j], u[k:, j])[0, 1] for j in range(u.shape[1]) for k in (1, 2, 64)
    ]
    assert np.abs(neighbours).max() < 5 / 4000**0.5


@pytest.mark.parametrize(
    "width, height, scale, ratio",
    [
        (500, 375, (0.2, 1.0), (3 / 4, 4 / 3)),
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (60, 400, (0.2, 1.0), (3 / 4, 4 / 3)),
        (400, 130, (0.05, 1.0), (0.5, 1.2)),
        (400, 20, (0.2, 1.0), (3 / 4, 4 / 3)),
        (2, 2, (0.2, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_crops_are_distributed_as_torchvisions(width, height, scale, ratio, blank):
    n = 6000
    crop = Crop(scale=scale, ratio=ratio)
    found = boxes(blank(width, height), (crop,), 0, np.arange(n), 0)[:, 0].astype(float)
    torch.manual_seed(0)
    picture = Image.new("RGB", (width, height))
    want = np.array([RandomResizedCrop.get_params(picture, scale, ratio) for _ in range(n)], float)
    top, left, h, w = found.T
    assert (
        (h > 0).all()
        and (w > 0).all()
        and (top >= 0).all()
        and (left >= 0).all()
        and (top + h <= height).all()
        and (left + w <= width).all()
    )
    for of in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: np.log(b[:, 3] / b[:, 2]),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] / np.maximum(height - b[:, 2], 1),
        lambda b: b[:, 1] / np.maximum(width - b[:, 3], 1),
    ):
        a, b = np.sort(of(found)), np.sort(of(want))
        at = np.unique(np.concatenate([a, b]))
        # Two-sample KS, p 1e-3.
        assert (
            abs(np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")).max() / n
            < 1.95 * (2 / n) ** 0.5
        )
        q = [0.1, 0.25, 0.5, 0.75, 0.9]
        spread = max(np.ptp(at), 1e-6)
        assert (
            abs(a.mean() - b.mean()) < 0.03 * spread
            and abs(np.quantile(a, q) - np.quantile(b, q)).max() < 0.05 * spread + 1
        )
    # the commonest box of an image too narrow for any try is the centre crop
    common, times = collections.Counter(map(tuple, found)).most_common(1)[0]
    same = (want == common).all(1).sum()
    if times > 0.05 * n:
        assert abs(times - same) < 5 * (2 * same) ** 0.5


# --- distance to torchvision


def pixels(view, crop):
    """[3,S,S] of the network -> [S,S,3] of 0..255."""
    x = view.permute(1, 2, 0).double() * torch.tensor(crop.std) + torch.tensor(crop.mean)
    return (x * 255).numpy()


def reference(picture, crop, p):
    """The view by PIL and torchvision from the twin's draws."""
    top, left, h, w = p["box"]
    how = dict(linear=F.InterpolationMode.BILINEAR, cubic=F.InterpolationMode.BICUBIC)[
        crop.interpolation
    ]
    x = F.resized_crop(picture, top, left, h, w, [crop.size, crop.size], how)
    if p["jitter"]:
        light = [
            lambda x: F.adjust_brightness(x, p["brightness"]),
            lambda x: F.adjust_contrast(x, p["contrast"]),
        ]
        colour = [
            lambda x: F.adjust_saturation(x, p["saturation"]),
            lambda x: F.adjust_hue(x, p["hue"] / 360),
        ]
        for op in light + colour if p["light_first"] else colour + light:
            x = op(x)
    if p["gray"]:
        x = F.rgb_to_grayscale(x, 3)
    if p["blur"]:
        x = F.gaussian_blur(x, 2 * math.ceil(3 * p["sigma"]) + 1, p["sigma"])
    if p["solarize"]:
        x = ImageOps.solarize(x, 128)
    return np.asarray(F.hflip(x) if p["flip"] else x, float)


def distances(photos, *crops, epochs=4):
    """(view's number, mean absolute difference of a view to its reference in 0..255, the twin's
    draws) of every view."""
    out = []
    for epoch, batch in enumerate(make(photos, crops, batch=4, epochs=epochs)):
        for v, crop in enumerate(crops):
            for view, index in zip(batch.views[v], batch.index.tolist()):
                picture = Image.open(photos.root / photos.files[index])
                p = twin(0, epoch, index, v, crop, picture.height, picture.width)
                out.append((v, abs(pixels(view, crop) - reference(picture, crop, p)).mean(), p))
    return out


@pytest.mark.parametrize(
    "name, change, bound",
    [
        ("crop", {}, 0.3),
        ("flip", dict(flip_p=1.0), 0.3),
        ("coin of the flip", dict(flip_p=0.5), 0.3),
        ("gray", dict(gray_p=1.0), 0.6),
        ("blur", dict(blur_p=1.0), 0.6),
        ("strong blur", dict(blur_p=1.0, blur_sigma=(3.0, 6.0)), 0.6),
        ("brightness", dict(jitter_p=1.0, jitter=(0.4, 0, 0, 0)), 1.5),
        ("contrast", dict(jitter_p=1.0, jitter=(0, 0.4, 0, 0)), 1.5),
        ("saturation", dict(jitter_p=1.0, jitter=(0, 0, 0.4, 0)), 1.5),
        ("light and saturation", dict(jitter_p=1.0, jitter=(0.4, 0.4, 0.4, 0)), 6.0),
        ("solarise", dict(solarize_p=1.0), 0.6),
        ("cubic", dict(interpolation="cubic"), 0.5),
        ("enlarged by cubic", dict(interpolation="cubic", scale=(0.01, 0.02)), 0.5),
        ("small hue", dict(jitter_p=1.0, jitter=(0, 0, 0, 0.01)), 4.0),
        ("hue", dict(jitter_p=1.0, jitter=(0, 0, 0, 0.1)), 30.0),
    ],
)
def test_a_view_is_as_torchvision_makes_it(name, change, bound, photos):
    far = [d for _, d, _ in distances(photos, Crop(size=96, **(PLAIN | change)))]
    assert max(far) < bound, far


def test_multi_crop_views_each_have_their_own_size_and_augmentation(photos):
    """SwAV's 2 + 6 crops and DINO's 2 + 8, whose two large views differ in blur and solarisation;
    without hue, which is not torchvision's."""
    jitter = dict(jitter=(0.4, 0.4, 0.2, 0))
    swav = [Crop(size=56, scale=(0.14, 1.0), **jitter)] * 2 + [
        Crop(size=24, scale=(0.05, 0.14), **jitter)
    ] * 6
    local = Crop(size=24, scale=(0.05, 0.4), interpolation="cubic", **jitter)
    dino = [
        Crop(size=56, scale=(0.4, 1.0), interpolation="cubic", blur_p=b, solarize_p=s, **jitter)
        for b, s in ((1, 0), (0.1, 0.2))
    ] + [local] * 8
    for crops in (swav, dino):
        found = distances(photos, *crops, epochs=8)
        assert np.median([d for _, d, _ in found]) < 1.5 and max(d for _, d, _ in found) < 12
        assert len({p["box"] for _, _, p in found}) > 0.95 * len(found)
    turned = [p["solarize"] for v, _, p in found if v == 1]
    assert any(turned) and not all(turned) and not any(p["solarize"] for v, _, p in found if v != 1)
    assert all(p["blur"] for v, _, p in found if v == 0)


def test_hue_is_in_turns_and_turns_as_far_and_as_torchvisions(photos):
    """The chroma of YIQ turns by the drawn angle, in the sense of torchvision's."""
    crop, still = (
        Crop(size=64, **(PLAIN | dict(jitter_p=1.0, jitter=(0, 0, 0, hue)))) for hue in (0.1, 0)
    )
    iq = np.array([[0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    chroma = lambda x: x @ iq.T @ [1, -1j]  # red to yellow is a positive angle
    angles = []
    for epoch, (a, b) in enumerate(
        zip(*(make(photos, (c,), batch=4, epochs=4) for c in (crop, still)))
    ):
        for i, index in enumerate(a.index.tolist()):
            picture = Image.open(photos.root / photos.files[index])
            drawn = twin(0, epoch, index, 0, crop, picture.height, picture.width)["hue"]
            flat = pixels(b.views[0][i], still)
            by_torchvision = np.asarray(
                F.adjust_hue(Image.fromarray(flat.round().astype(np.uint8)), drawn / 360), float
            )
            angles.append(
                [drawn]
                + [
                    np.angle((chroma(x) * chroma(flat).conj()).sum(), deg=True)
                    for x in (pixels(a.views[0][i], crop), by_torchvision)
                ]
            )
    drawn, ours, theirs = np.array(angles).T
    assert abs(drawn).max() > 25
    # Colours that leave 0..255 are clipped.
    assert np.median(abs(ours - drawn)) < 1 and abs(ours - drawn).max() < 8
    assert np.median(abs(ours - theirs)) < 6 and np.corrcoef(ours, theirs)[0, 1] > 0.9


def test_contrast_about_the_grey_mean_has_one_meaning_on_both_devices(photos):
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def
    def both(b, c):
        x = fn.decoders.image(
            fn.readers.file(file_root=str(photos.root), files=photos.files)[0],
            output_type=types.RGB,
        )
        mean = fn.reductions.mean(
            fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
        )
        b, c = types.Constant(b, device="cpu"), types.Constant(c, device="cpu")
        d = dict(brightness=b, contrast=c)
        return tuple(
            y
            for t in (types.UINT8, types.FLOAT)
            for y in (graph._light(x, mean, d, "cpu", t), graph._light_of_mean(x, b, c, mean, t))
        )

    for b, c in ((1.4, 1.4), (0.6, 1.4), (1.4, 0.6), (0.6, 0.6), (1.0, 0.0)):
        whole_cpu, whole_gpu, cpu, gpu = both(
            b, c, batch_size=4, num_threads=1, device_id=None, prefetch_queue_depth=1
        ).run()
        for x, y, u, v in zip(whole_cpu, whole_gpu, cpu, gpu):
            assert abs(np.array(x).astype(int) - np.array(y)).max() <= 1
            assert (
                abs(np.array(u) - np.array(v)).max() < 1e-3
                and abs(np.array(u) - np.array(x)).max() <= 1
            )


# --- hand-over


def test_batches_are_channels_last_without_a_copy_and_outlive_the_loader(few):
    train = make(few, epochs=2)
    batch = next(train)
    train._pipes = [Spy(*train._pipes)]
    second = next(train)
    assert [v.data_ptr() for v in second.views] == train._pipes[0].pointers
    kept = [b.clone() for b in batch.views + second.views]
    for v, crop in zip(batch.views, SMALL):
        assert v.shape == (8, 3, crop.size, crop.size) and v.dtype == torch.float32
        assert v.is_contiguous(memory_format=torch.channels_last) and not v.is_contiguous()
    for _ in range(6):
        next(train)
    assert all(torch.equal(a, b) for a, b in zip(kept, batch.views + second.views))
    del train
    gc.collect()
    list(make(few, epochs=2))
    assert all(torch.equal(a, b) for a, b in zip(kept, batch.views + second.views))


def test_copied_views_are_the_same_in_memory_of_torchs_own(few):
    place = default_placement(CPU)
    ways = place, place._replace(copy=True)
    plain, copied = (
        data.TrainLoader(few, SMALL, 8, 0, 2, 1, 1, CPU, placement=way) for way in ways
    )
    for a, b in zip(plain, copied, strict=True):
        assert torch.equal(a.index, b.index)
        for x, y in zip(a.views, b.views, strict=True):
            assert torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype
    again = data.TrainLoader(few, SMALL, 8, 0, 2, 1, 1, CPU, placement=ways[1])
    next(again)
    again._pipes = [Spy(*again._pipes)]
    there = {v.data_ptr() for v in next(again).views}
    assert there.isdisjoint(again._pipes[0].pointers)
    with_copies = data.EvalLoader(few, 24, 16, 5, 1, CPU, placement=ways[1])
    for a, b in zip(data.EvalLoader(few, 24, 16, 5, 1, CPU), with_copies, strict=True):
        assert torch.equal(a.views[0], b.views[0])


class Spy:
    """A pipeline that notes where its last views lie."""

    def __init__(self, pipe):
        self.pipe = pipe

    def run(self, stream):
        out = self.pipe.run(stream)
        self.pointers = [v.as_tensor().data_ptr() for v in out]
        return out


# --- evaluation


@pytest.mark.parametrize("resize, size", [(64, 56), (75, 64), (40, 40), (33, 8)])
def test_evaluation_views_are_torchvisions(resize, size, folder, photos, tmp_path):
    for i, (w, h) in enumerate([(97, 60), (60, 97), (33, 33), (20, 31), (41, 200), (199, 64)]):
        (tmp_path / "c").mkdir(exist_ok=True)
        Image.open(photos.root / photos.files[i % 4]).resize((w, h)).save(
            tmp_path / "c" / f"{i}.png"
        )
    for listing in (photos, data.listing(tmp_path)):
        for batch in data.EvalLoader(listing, resize, size, 3, 1, CPU):
            for view, index in zip(batch.views[0], batch.index.tolist()):
                want = F.center_crop(
                    F.resize(Image.open(listing.root / listing.files[index]), resize), size
                )
                d = abs(pixels(view, Crop()) - np.asarray(want, float))
                # The outermost pixels differ most, see graph.py.
                assert d.mean() < 0.5 and d.max() < 20, listing.files[index]
                assert d[1:-1, 1:-1].max() <= 3, listing.files[index]


def test_evaluation_goes_through_the_indices_in_order_again_and_again(few):
    indices = [5, 3, 40, 3, 0, 12, 42]
    ev = data.EvalLoader(few, 24, 16, 3, 1, CPU, indices)
    first, second = list(ev), list(ev)
    assert len(ev) == 7 and [len(b.index) for b in first] == [3, 3, 1] == [
        len(b.views[0]) for b in first
    ]
    assert torch.cat([b.index for b in first]).tolist() == indices
    assert torch.cat([b.label for b in first]).tolist() == few.labels[indices].tolist()
    assert all(torch.equal(a.views[0], b.views[0]) for a, b in zip(first, second))
    whole = torch.cat([b.views[0] for b in data.EvalLoader(few, 24, 16, 64, 2, CPU)])
    assert torch.equal(whole[indices], torch.cat([b.views[0] for b in first]))
    assert list(data.EvalLoader(few, 24, 16, 3, 1, CPU, [])) == []
    halved = next(
        iter(data.EvalLoader(few, 24, 16, 3, 1, CPU, indices, mean=(0.0,) * 3, std=(2.0,) * 3))
    )
    assert (
        abs(
            pixels(halved.views[0][0], Crop(mean=(0,) * 3, std=(2,) * 3))
            - pixels(first[0].views[0][0], Crop())
        ).max()
        < 1e-3
    )


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


def one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text and all(p in text for p in parts), text


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


# --- GPU

GPU = Placement("gpu", "gpu", "gpu", True, 0.65, 2)
PLACEMENTS = {
    "gpu": GPU,
    "cpu decode": GPU._replace(decode="cpu"),
    "cpu": GPU._replace(decode="cpu", augment="cpu"),
    "fp32": GPU._replace(half=False),
    "no engine": GPU._replace(hw_load=0.0),
}
RICH = dict(flip_p=1, jitter_p=1, gray_p=1, blur_p=1, solarize_p=1, interpolation="cubic")
MULTI = (
    Crop(),
    Crop(size=96, solarize_p=0.2, blur_p=0.1, scale=(0.05, 0.4)),
    Crop(size=96, **PLAIN),
    Crop(size=96, **RICH),
    Crop(jitter_p=0),
)


def serialised(listing, folder, placement):
    """Operators (name, device) of the graphs of training, evaluation and the check; each is
    registered for its device and the graphs serialise."""
    from nvidia.dali import backend

    reader = pipelines.reader(listing, np.arange(40), folder)
    pipe = dict(batch_size=4, num_threads=1, device_id=None)
    known = dict(
        cpu=set(backend.RegisteredCPUOps()),
        gpu=set(backend.RegisteredGPUOps()),
        mixed=set(backend.RegisteredMixedOps()),
    )
    used = []
    for p in (
        graph.train(MULTI, reader, lambda i: [], placement, **pipe),
        graph.evaluate(256, 224, Crop().mean, Crop().std, reader, placement, **pipe),
        graph.decode(lambda: [], placement, **pipe),
    ):
        assert p.serialize()
        used += [
            (getattr(o._op, "schema_name", type(o._op).__name__), o._op.device) for o in p._ops
        ]
    assert [u for u in used if u[0] not in known[u[1]]] == []
    return set(used)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_gpu_graphs_serialise_and_every_operator_exists_for_its_device(name, few):
    placement = PLACEMENTS[name]
    used = serialised(few, "", placement)
    assert (
        (("decoders__Image", "mixed") in used)
        == (placement.decode == "gpu")
        != (("decoders__Image", "cpu") in used)
    )
    assert (("Hsv", "gpu") in used) == (placement.augment == "gpu") != (("Hsv", "cpu") in used)
    assert ("CropMirrorNormalize", "gpu") in used and ("CropMirrorNormalize", "cpu") not in used


def test_the_way_follows_configuration_and_device():
    gpu, base = torch.device("cuda", 0), dict(train="x")
    placement = lambda device, precision="fp32", **keys: data.place(
        config.Data(**base, **keys), device, precision
    )
    assert placement(CPU) == default_placement(CPU) == ("cpu", "cpu", "cpu", False, 0.65, 2, False)
    assert placement(CPU, "bf16").half is False  # on the CPU halves are slower
    assert (
        placement(gpu) == default_placement(gpu) == ("gpu", "gpu", "gpu", False, 0.65, 2, False)
        and placement(gpu, "fp16").half
        and placement(gpu, "bf16").half
    )
    assert placement(gpu, decode="cpu")[:3] == ("cpu", "gpu", "gpu") and placement(
        gpu, augment="cpu"
    )[:3] == ("cpu", "cpu", "gpu")
    chosen = placement(gpu, decode="gpu", hw_decoder_load=0.2, prefetch=5, copy_views=True)
    assert chosen[3:] == (False, 0.2, 5, True)
    for key in ("decode", "augment"):
        with pytest.raises(UserError) as e:
            placement(CPU, **{key: "gpu"})
        one_sentence(e, f"data.{key}", "no", "GPU", "auto or cpu")
    with pytest.raises(UserError) as e:
        config.validate(
            dict(run=dict(name="x"), data=base | dict(decode="gpu", augment="cpu")), "here"
        )
    one_sentence(e, "here", "decode: gpu", "data.augment: cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLACEMENTS)
def test_gpu_views_are_the_cpus(name, photos, few):
    gpu, placement = torch.device("cuda", 0), PLACEMENTS[name]
    crops = (
        Crop(size=96),
        Crop(size=64, solarize_p=0.5, interpolation="cubic"),
        Crop(size=48, jitter_p=0),
        Crop(size=48, **PLAIN),
    )
    for listing in (photos, few):  # PNG, which nvJPEG does not read, and JPEG
        there = data.TrainLoader(listing, crops, 4, 0, 5, 1, 1, gpu, placement=placement)
        for a, b in zip(make(listing, crops, batch=4, epochs=5), there):
            assert torch.equal(a.index, b.index)
            for crop, x, y in zip(crops, a.views, b.views):
                assert y.device == gpu and y.dtype == (
                    torch.float16 if placement.half else torch.float32
                )
                assert y.is_contiguous(memory_format=torch.channels_last)
                if placement.augment == "cpu":
                    # Float16's rounding of values up to 2.7.
                    assert abs(x - y.cpu().float()).max() < 2e-3
                for one, other in zip(x, y.cpu().float()):
                    assert abs(pixels(one, crop) - pixels(other, crop)).mean() < 3
        for a, b in zip(
            data.EvalLoader(listing, 72, 64, 3, 1, CPU),
            data.EvalLoader(listing, 72, 64, 3, 1, gpu, placement=placement),
        ):
            assert (
                abs(
                    pixels(a.views[0][0], Crop()) - pixels(b.views[0][0].cpu().float(), Crop())
                ).mean()
                < 1.5
            )


@pytest.mark.gpu
def test_halves_are_the_rounded_floats(photos):
    gpu = torch.device("cuda", 0)
    a, b = (
        data.TrainLoader(photos, SMALL, 4, 0, 3, 1, 1, gpu, placement=GPU._replace(half=half))
        for half in (False, True)
    )
    for x, y in zip(a, b):
        for u, v in zip(x.views, y.views):
            # One unit in the last place of values up to 2.7.
            assert abs(u.half().float() - v.float()).max() < 2e-3


@pytest.mark.gpu
def test_taking_batches_waits_for_nothing_and_copies_nothing(photos):
    gpu = torch.device("cuda", 0)
    train = data.TrainLoader(photos, SMALL, 4, 0, 40, 1, 1, gpu, placement=GPU)
    kept = [next(train) for _ in range(3)]
    before = [v.clone() for b in kept for v in b.views]
    train._pipes = [Spy(*train._pipes)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            batch = next(train)
            assert [v.data_ptr() for v in batch.views] == train._pipes[0].pointers
            (batch.views[0].float() * 2).sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # DALI reuses no memory that a tensor holds.
    assert all(torch.equal(a, b) for a, b in zip(before, (v for b in kept for v in b.views)))


@pytest.mark.gpu
def test_copied_views_wait_for_nothing_and_are_the_same_on_a_gpu(photos):
    gpu = torch.device("cuda", 0)
    plain, copied = (
        data.TrainLoader(photos, SMALL, 4, 0, 40, 1, 1, gpu, placement=GPU._replace(copy=copy))
        for copy in (False, True)
    )
    # Decoding by the engine or by the cores depends on the place in the batch alone.
    for _ in range(3):
        for x, y in zip(next(plain).views, next(copied).views):
            assert torch.equal(x, y) and y.is_contiguous(memory_format=torch.channels_last)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            # Its memory is torch's again at once, while work on the old values is still queued.
            (next(copied).views[0].float() * 2).sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "gif", "header"])
def test_what_the_gpu_decoder_does_with_a_bad_file(kind, few, tmp_path, capfd):
    """Refused with its name, as on the CPU, or, where nvJPEG reads what libjpeg does not, decoded:
    never a crash."""
    root = tmp_path / "train"
    shutil.copytree(few.root, root)
    listing = data.listing(root)
    bad = listing.files[17]
    content = (root / bad).read_bytes()
    if kind == "gif":
        Image.new("RGB", (9, 9)).save(root / bad, "GIF")
    else:
        (root / bad).write_bytes(
            {
                "truncated": content[: len(content) // 2],
                "text": b"no image at all",
                "empty": b"",
                "header": content[:100],
            }[kind]
        )
    train = data.TrainLoader(listing, SMALL, 8, 0, 2, 1, 1, torch.device("cuda", 0), placement=GPU)
    if kind == "truncated":
        said = bad
        try:
            list(train)
        except UserError as e:
            said = str(e)
        # The decoder may as well have taken what is there of it.
        assert bad in said
    else:
        with pytest.raises(UserError) as e:
            list(train)
        one_sentence(e, f"unreadable image {bad}", f"--only {bad}`")
