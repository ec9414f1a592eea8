"""DALI graphs: what happens to an image between its file and the network, on CPU or GPU by one
definition.

Departures from torchvision's transforms, on which MoCo-v2's augmentation is defined:
- Hue turns the colours in YIQ, not in HSV: same direction and angle, other lightness of what comes
out.
- Brightness and contrast are one step, as are saturation and hue, clipped after each; the two steps
  come in a random order.  torchvision clips after each of the four and draws one of 24 orders.  The
  grey mean of contrast is taken before anything is clipped.
- Where a view has the colour step, grey is a saturation of 0 there, so it comes before that step's
clipping.
- Blur is a true Gaussian cut at 3 sigma, as torchvision's; MoCo's is PIL's, three box filters that
approximate it.
- Where the resizing filter reaches past a crop's border, it sees the image beyond, and at the
  image's border the outermost pixel again; PIL crops first and shortens the filter.
- From the second colour step on, and in the blur, values are not rounded to whole ones.
- EXIF orientation is ignored, as by torchvision's ImageFolder.
"""

from collections.abc import Callable

import numpy as np
import nvidia.dali
from nvidia.dali import fn, math, pipeline_def, types

from fastdisco.config import Crop
from fastdisco.data import draws
from fastdisco.data.placement import Placement

INTERPOLATION = dict(linear=types.INTERP_LINEAR, cubic=types.INTERP_CUBIC)
VERSION = ".".join(nvidia.dali.__version__.split(".")[:2])  # another may round a view otherwise


# Besides what they name, these take the arguments of DALI's Pipeline: batch_size, num_threads ...
@pipeline_def(enable_conditionals=True)
def train(crops: tuple[Crop, ...], reader: dict, feed: Callable, placement: Placement):
    """Pipeline whose outputs are the views [S,S,3] of each crop, float32 or float16.

    reader  arguments of fn.readers.file, or of fn.readers.webdataset
    feed    number of the batch -> what `draws.feed` gives of its images"""
    image, hw = _decoded(_read(reader), placement)
    tries, place, each = _fed(crops, feed, placement)
    start, end = _boxes(hw, tries, place, crops)
    views = []
    for v, (crop, d) in enumerate(zip(crops, each)):
        x = fn.resize(
            image,
            size=[crop.size, crop.size],
            roi_start=start[v, 0],
            roi_end=end[v, 0],
            interp_type=INTERPOLATION[crop.interpolation],
        )
        views.append(_augment(x, crop, d, placement))
    return tuple(views)


@pipeline_def
def evaluate(resize: int, size: int, mean, std, reader: dict, placement: Placement):
    """Pipeline of one view [size,size,3]: short side to `resize`, centre crop, as torchvision
    rounds."""
    image, hw = _decoded(_read(reader), placement)
    hw = fn.cast(hw, dtype=types.INT64)
    new = hw * resize // fn.reductions.min(hw)
    spare = new - size
    half = spare // 2
    # Spare / 2, a half rounded to even as Python's round does.
    start = half + (spare - 2 * half) * (half - half // 2 * 2)
    x = fn.resize(image, size=fn.cast(new, dtype=types.FLOAT))
    x = fn.slice(x, start=fn.cast(start, dtype=types.INT32), shape=[size, size], axes=[0, 1])
    return _normalise(x, mean, std, placement)


@pipeline_def
def decode(source, placement: Placement):
    """Pipeline that only decodes what source() returns, encoded images as uint8 arrays: which are
    unreadable?"""
    return _image(
        fn.external_source(source=source, batch=True, dtype=types.UINT8, ndim=1), placement
    )


def _read(reader):
    """Encoded images in the reader's order: of files, or of samples in tars."""
    if "files" in reader:
        return fn.readers.file(**reader)[0]
    # a shorter tar than its index says is an error of the reader with dont_use_mmap, and a
    # segmentation fault without
    return fn.readers.webdataset(
        **reader, ext=["img"], dont_use_mmap=True, missing_component_behavior="error"
    )


def _fed(crops, feed, placement):
    """What `feed` gives: tries and place, and for each view a dict of the draws that it takes."""
    kinds = dict(
        light_first=(types.BOOL, 0),
        jitter=(types.BOOL, 0),
        gray=(types.BOOL, 0),
        blur=(types.BOOL, 0),
        solarize=(types.BOOL, 0),
        flip=(types.INT32, 0),
        across=(types.FLOAT, 2),
        down=(types.FLOAT, 2),
    )
    names = [draws.names(crop, placement.augment) for crop in crops]
    dtype, ndim = zip(
        (types.FLOAT, 3),
        (types.FLOAT, 3),
        *(kinds.get(n, (types.FLOAT, 0)) for one in names for n in one),
    )
    tries, place, *rest = fn.external_source(
        source=feed, num_outputs=len(dtype), batch=True, dtype=list(dtype), ndim=list(ndim)
    )
    rest = iter(rest)
    return tries, place, [{n: next(rest) for n in one} for one in names]


def _decoded(encoded, placement):
    """Image [H,W,3] uint8 where the augmentation is, and its (H, W) as float32 [2] on the CPU."""
    image = _image(encoded, placement)
    if placement.decode == "gpu":
        return image, fn.peek_image_shape(encoded, dtype=types.FLOAT, adjust_orientation=False)[0:2]
    return image.gpu() if placement.augment == "gpu" else image, image.shape(dtype=types.FLOAT)[0:2]


def _image(encoded, placement):
    if placement.decode == "cpu":
        return fn.decoders.image(
            encoded, device="cpu", output_type=types.RGB, adjust_orientation=False
        )
    return fn.decoders.image(
        encoded,
        device="mixed",
        output_type=types.RGB,
        adjust_orientation=False,
        hw_decoder_load=placement.hw_load,
        # Without it the chroma differs from the CPU's.
        jpeg_fancy_upsampling=True,
    )


def _boxes(hw, tries, place, crops):
    """Start and end of each view's crop, [V,1,2] float32 (vertical, horizontal): the first of ten
    tries that lies in the image.

    torchvision's RandomResizedCrop: share of the area and log of the ratio uniform, sides rounded;
    where no try fits, the centre crop of the nearest ratio."""
    h, w = hw[0], hw[1]
    tries = math.floor(tries * math.sqrt(h * w) + 0.5)
    widest = np.array([[[1 / c.ratio[0], c.ratio[1]]] for c in crops], np.float32)
    # [V,1,2], fits always.
    centre = math.max(math.min(math.floor(fn.stack(w, h) * types.Constant(widest) + 0.5), hw), 1.0)
    sides = fn.cat(tries, centre, axis=1)
    rank = types.Constant(np.arange(draws.TRIES, -1, -1, dtype=np.float32)[:, None] + 1)
    # [V,11,1]: 0 where it does not fit.
    score = fn.reductions.min((sides <= hw) * (sides > 0.5) * rank, axes=2, keep_dims=True)
    best = fn.reductions.max(score, axes=1, keep_dims=True)
    shape = fn.reductions.sum(sides * (score == best), axes=1, keep_dims=True)
    drawn = best > 1.5  # [V,1,1]: not the centre crop
    spare = hw - shape
    place = (place - 0.5) * drawn + 0.5
    start = math.min(math.floor(place * (spare + drawn)), spare)  # of a draw that is 1, spare + 1
    return start, start + shape


def _augment(x, crop, d, placement):
    """A resized crop [S,S,3] uint8 -> the normalised view.  What has chance 0 is not in the graph,
    what has 1 needs no coin."""
    device = placement.augment
    if crop.jitter_p == 1:
        x = _jitter(x, d, device)
    elif crop.jitter_p > 0:
        if d["jitter"]:
            x = _jitter(x, d, device)
        else:
            x = _still(x, crop, d)
    else:
        x = _still(x, crop, d)
    if crop.blur_p == 1:
        x = _blur(x, d, device)
    elif crop.blur_p > 0:
        if d["blur"]:
            x = _blur(x, d, device)
    if crop.solarize_p == 1:
        x = _solarize(x)
    elif crop.solarize_p > 0:
        if d["solarize"]:
            x = _solarize(x)
    return _normalise(x, crop.mean, crop.std, placement, mirror=d["flip"])


def _still(x, crop, d):
    """Without jitter: uint8 -> float32, grey or not."""
    if crop.gray_p == 1:
        x = _gray(x)
    elif crop.gray_p > 0:
        if d["gray"]:
            x = _gray(x)
    return fn.cast(x, dtype=types.FLOAT)


def _gray(x):
    x = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    return fn.color_space_conversion(x, image_type=types.GRAY, output_type=types.RGB)


def _jitter(x, d, device):
    """uint8 -> float32 in 0..255, grey where the saturation is 0."""
    mean = fn.reductions.mean(
        fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    )
    if d["light_first"]:
        x = _colour(_light(x, mean, d, device, types.UINT8), d)
    else:
        x = _light(_colour(x, d), mean, d, device, types.FLOAT)
    return x


def _colour(x, d):
    # On the CPU rounding to uint8 takes longer than this.
    return _clip(fn.hsv(x, saturation=d["saturation"], hue=d["hue"], dtype=types.FLOAT))


def _light(x, mean, d, device, dtype):
    """b * (c * (x - m) + m): brightness b, then contrast c about the mean it left.  m: the mean of
    the picture in grey, which colour leaves."""
    b, c = d["brightness"], d["contrast"]
    if device == "gpu":
        # An argument cannot come from the GPU, where the mean is.
        return _light_of_mean(x, b.gpu(), c.gpu(), mean, dtype)
    x = fn.brightness_contrast(x, brightness=b, contrast=c, contrast_center=mean, dtype=dtype)
    return x if dtype == types.UINT8 else _clip(x)


def _light_of_mean(x, b, c, mean, dtype):
    return fn.cast(_clip(x * (b * c) + mean * (b - b * c)), dtype=dtype)


def _clip(x):
    return math.min(math.max(x, 0.0), 255.0)  # a fourth of math.clamp's time


def _blur(x, d, device):
    if device == "gpu":
        return fn.gaussian_blur(x, sigma=d["sigma"])
    return fn.filter(fn.filter(x, d["across"]), d["down"])  # a sixth of the time of gaussian_blur


def _solarize(x):
    return math.min(x, 255.0 - x)


def _normalise(x, mean, std, placement, mirror=0):
    """[H,W,3] of 0..255 -> the network's; channels stay last, so the batch is a channels_last
    tensor of the network without a copy."""
    if placement.out != placement.augment:
        x = x.gpu()
    mean, std = [255 * m for m in mean], [255 * s for s in std]
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT16 if placement.half else types.FLOAT,
        output_layout="HWC",
        mean=mean,
        std=std,
        mirror=mirror,
    )
