"""What is drawn for a view, against a twin in Python and the distribution of torchvision's crops; and
the likeness of views to torchvision's."""

import collections
import itertools
import math

import numpy as np
import pytest
import torch
from image_sets import PLAIN, make, pixels
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from fastdisco.config import Crop
from fastdisco.data import draws, graph

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
