# ruff: noqa: SIM102, SIM108
# Two nested ifs are two kinds of if here: the outer one is Python's, decided while the graph is
# built, the inner one is DALI's, decided for each image.
"""DALI graphs: what happens to an image between its file and the network, on CPU or GPU by one
definition.

A function below does not compute pictures but adds operators to a graph, once; DALI then runs the
graph for every batch.  The random draws come in from outside, made by draws.py.

Departures from torchvision's transforms, on which MoCo-v2's augmentation is defined:
- Hue turns the colours in YIQ, not in HSV: same direction and angle, other lightness of the result.
- Brightness and contrast are one step, as are saturation and hue, clipped after each.  The two
  steps come in a random order.  torchvision clips after each of the four and draws one of 24
  orders.  The grey mean of contrast is taken before anything is clipped.
- Where a view has the colour step, grey is a saturation of 0 there, so it comes before that step's
  clipping.
- Blur is a true Gaussian cut at 3 sigma, as torchvision's.  MoCo's is PIL's, three box filters that
  approximate it.
- Where the resizing filter reaches past a crop's border, it sees the image beyond, and at the
  image's border the outermost pixel again.  PIL crops first and shortens the filter.
- From the second colour step on, and in the blur, values are not rounded to whole ones.
- EXIF orientation is ignored, as by torchvision's ImageFolder.

Shapes, of one image as DALI has them: V views, S side of a view, H, W of the image."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import nvidia.dali
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode

from fastdisco.config import Crop
from fastdisco.data import draws
from fastdisco.data.placement import Placement

INTERPOLATION = dict(linear=types.INTERP_LINEAR, cubic=types.INTERP_CUBIC)
# Another release may round a view otherwise.
VERSION = ".".join(nvidia.dali.__version__.split(".")[:2])

# Type and number of axes of each draw; a float of no axes unless it stands here.
DRAWS = dict(
    light_first=(types.BOOL, 0),
    jitter=(types.BOOL, 0),
    gray=(types.BOOL, 0),
    blur=(types.BOOL, 0),
    solarize=(types.BOOL, 0),
    flip=(types.INT32, 0),
    across=(types.FLOAT, 2),
    down=(types.FLOAT, 2),
)


# ---- the graphs; besides what they name, they take the arguments of DALI's Pipeline: batch_size,
# num_threads ...


@pipeline_def(enable_conditionals=True)
def train(
    crops: tuple[Crop, ...],
    reader: dict[str, Any],
    feed: Callable[[int], list[np.ndarray]],
    placement: Placement,
) -> tuple[DataNode, ...]:
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
def evaluate(
    resize: int,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    reader: dict[str, Any],
    placement: Placement,
    interpolation: str = "linear",
) -> DataNode:
    """Pipeline of one view [size,size,3]: short side to `resize`, centre crop, as torchvision
    rounds."""
    image, hw = _decoded(_read(reader), placement)
    hw = fn.cast(hw, dtype=types.INT64)
    new = hw * resize // fn.reductions.min(hw)
    # spare / 2, with a half rounded to the even number, as Python's round does.
    spare = new - size
    half = spare // 2
    start = half + (spare - 2 * half) * (half - half // 2 * 2)
    # Only the crop is resized: of a thin image the whole would be enormous.
    to_source = fn.cast(hw, dtype=types.FLOAT) / fn.cast(new, dtype=types.FLOAT)
    x = fn.resize(
        image,
        size=[size, size],
        roi_start=fn.cast(start, dtype=types.FLOAT) * to_source,
        roi_end=fn.cast(start + size, dtype=types.FLOAT) * to_source,
        interp_type=INTERPOLATION[interpolation],
    )
    return _normalise(x, mean, std, placement)


@pipeline_def
def decode(source: Callable[[], list[np.ndarray]], placement: Placement) -> DataNode:
    """Pipeline that only decodes what source() returns, encoded images as uint8 arrays, to find the
    unreadable ones."""
    encoded = fn.external_source(source=source, batch=True, dtype=types.UINT8, ndim=1)
    return _image(encoded, placement)


# ---- inputs: encoded images, and their draws


def _read(reader: dict[str, Any]) -> DataNode:
    """Encoded images in the reader's order: of files, or of samples in tars."""
    if "file_root" in reader:
        # A mapped file that is cut short ends the process by a signal.
        return fn.readers.file(**reader, dont_use_mmap=True)[0]
    # A tar that is shorter than its index says is an error of the reader with dont_use_mmap, and a
    # segmentation fault without.
    return fn.readers.webdataset(
        **reader, ext=["img"], dont_use_mmap=True, missing_component_behavior="error"
    )


def _fed(
    crops: tuple[Crop, ...], feed: Callable[[int], list[np.ndarray]], placement: Placement
) -> tuple[DataNode, DataNode, list[dict[str, DataNode]]]:
    """What `feed` gives: tries [V,TRIES,2] and place [V,1,2], and for each view a dict of the draws
    that it takes."""
    names = [draws.names(crop, placement.augment) for crop in crops]
    kinds = [(types.FLOAT, 3), (types.FLOAT, 3)]
    kinds += [DRAWS.get(name, (types.FLOAT, 0)) for one in names for name in one]
    dtypes, ndims = zip(*kinds)
    tries, place, *rest = fn.external_source(
        source=feed, num_outputs=len(kinds), batch=True, dtype=list(dtypes), ndim=list(ndims)
    )
    rest = iter(rest)
    return tries, place, [{name: next(rest) for name in one} for one in names]


def _decoded(encoded: DataNode, placement: Placement) -> tuple[DataNode, DataNode]:
    """Image [H,W,3] uint8 on the device of the augmentation, and (H, W) as float32 [2] on the
    CPU."""
    image = _image(encoded, placement)
    if placement.decode == "gpu":
        # Read from the header, since the image itself is on the GPU.
        shape = fn.peek_image_shape(encoded, dtype=types.FLOAT, adjust_orientation=False)
        return image, shape[0:2]
    shape = image.shape(dtype=types.FLOAT)
    return image.gpu() if placement.augment == "gpu" else image, shape[0:2]


def _image(encoded: DataNode, placement: Placement) -> DataNode:
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


# ---- the crop


def _boxes(
    hw: DataNode, tries: DataNode, place: DataNode, crops: tuple[Crop, ...]
) -> tuple[DataNode, DataNode]:
    """Start and end of each view's crop, [V,1,2] float32 (vertical, horizontal): the first of ten
    tries that lies in the image.

    As torchvision's RandomResizedCrop: share of the area and log of the ratio are uniform, sides
    are rounded, and where no try fits the crop is the centre crop of the nearest ratio."""
    h, w = hw[0], hw[1]
    tries = math.floor(tries * math.sqrt(h * w) + 0.5)
    # The centre crop [V,1,2] always fits: each side at most what the widest ratio allows.
    widest = np.array([[[1 / c.ratio[0], c.ratio[1]]] for c in crops], np.float32)
    centre = math.floor(fn.stack(w, h) * types.Constant(widest) + 0.5)
    centre = math.max(math.min(centre, hw), 1.0)
    # Candidates [V,11,2]: a graph has no loop, so each gets a score [V,11,1], 0 where it does not
    # fit, else 11 for the first down to 1 for the centre crop.  The highest wins.
    sides = fn.cat(tries, centre, axis=1)
    rank = types.Constant(np.arange(draws.TRIES, -1, -1, dtype=np.float32)[:, None] + 1)
    fits = (sides <= hw) * (sides > 0.5)
    score = fn.reductions.min(fits * rank, axes=2, keep_dims=True)
    best = fn.reductions.max(score, axes=1, keep_dims=True)
    shape = fn.reductions.sum(sides * (score == best), axes=1, keep_dims=True)

    drawn = best > 1.5  # [V,1,1]: not the centre crop
    spare = hw - shape
    place = (place - 0.5) * drawn + 0.5  # the middle for the centre crop
    # One of spare + 1 places.  A draw that is 1 after rounding would give one more.
    start = math.min(math.floor(place * (spare + drawn)), spare)
    return start, start + shape


# ---- the augmentation of a view


def _augment(x: DataNode, crop: Crop, d: dict[str, DataNode], placement: Placement) -> DataNode:
    """A resized crop [S,S,3] uint8 -> the normalised view.

    A step of chance 0 is not in the graph, one of chance 1 needs no coin."""
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


def _still(x: DataNode, crop: Crop, d: dict[str, DataNode]) -> DataNode:
    """Without jitter: uint8 -> float32, grey or not."""
    if crop.gray_p == 1:
        x = _gray(x)
    elif crop.gray_p > 0:
        if d["gray"]:
            x = _gray(x)
    return fn.cast(x, dtype=types.FLOAT)


def _gray(x: DataNode) -> DataNode:
    x = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    return fn.color_space_conversion(x, image_type=types.GRAY, output_type=types.RGB)


def _jitter(x: DataNode, d: dict[str, DataNode], device: str) -> DataNode:
    """uint8 -> float32 in 0..255, grey where the saturation is 0."""
    gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    mean = fn.reductions.mean(gray)
    if d["light_first"]:
        x = _colour(_light(x, mean, d, device, types.UINT8), d)
    else:
        x = _light(_colour(x, d), mean, d, device, types.FLOAT)
    return x


def _colour(x: DataNode, d: dict[str, DataNode]) -> DataNode:
    # Float, since on the CPU rounding to uint8 takes longer than clipping.
    return _clip(fn.hsv(x, saturation=d["saturation"], hue=d["hue"], dtype=types.FLOAT))


def _light(
    x: DataNode, mean: DataNode, d: dict[str, DataNode], device: str, dtype: types.DALIDataType
) -> DataNode:
    """Brightness b, then contrast c about the mean that brightness left: b * (c * (x - m) + m).

    mean: m, of the picture in grey, which the colour step leaves as it is"""
    b, c = d["brightness"], d["contrast"]
    if device == "gpu":
        # The mean is on the GPU, where brightness_contrast takes no argument from.
        return _light_of_mean(x, b.gpu(), c.gpu(), mean, dtype)
    x = fn.brightness_contrast(x, brightness=b, contrast=c, contrast_center=mean, dtype=dtype)
    # A uint8 is clipped already.
    return x if dtype == types.UINT8 else _clip(x)


def _light_of_mean(
    x: DataNode, b: DataNode, c: DataNode, mean: DataNode, dtype: types.DALIDataType
) -> DataNode:
    """The same as arithmetic."""
    return fn.cast(_clip(x * (b * c) + mean * (b - b * c)), dtype=dtype)


def _clip(x: DataNode) -> DataNode:
    # A fourth of math.clamp's time.
    return math.min(math.max(x, 0.0), 255.0)


def _blur(x: DataNode, d: dict[str, DataNode], device: str) -> DataNode:
    if device == "gpu":
        return fn.gaussian_blur(x, sigma=d["sigma"])
    # On the CPU a sixth of the time of gaussian_blur.
    return fn.filter(fn.filter(x, d["across"]), d["down"])


def _solarize(x: DataNode) -> DataNode:
    return math.min(x, 255.0 - x)


def _normalise(
    x: DataNode,
    mean: Sequence[float],
    std: Sequence[float],
    placement: Placement,
    mirror: DataNode | int = 0,
) -> DataNode:
    """[H,W,3] of 0..255 -> the network's values.

    Channels stay last, so the batch is a channels_last tensor of the network without a copy."""
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
