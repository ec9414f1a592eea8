"""DALI graphs: what happens to an image between its file and the network, on CPU or GPU by one definition.

Every random draw of a view is hashed inside the graph from (seed, epoch, image index, view), never taken from a stream: neither batch
size, rank, order, threads nor a restart changes an image's views.

Departures from torchvision's transforms, on which MoCo-v2's augmentation is defined:
- Hue turns the colours in YIQ, not in HSV: same direction and angle, other lightness of what comes out.
- Brightness and contrast are one step, as are saturation and hue, clipped after each; the two steps come in a random order.  torchvision
  clips after each of the four and draws one of 24 orders.  The grey mean of contrast is taken before brightness is clipped.
- Blur is a true Gaussian cut at 3 sigma, as torchvision's; MoCo's is PIL's, three box filters that approximate it.
- Where the resizing filter reaches past a crop's border, DALI repeats the outermost pixel and PIL shortens the filter: up to 15 of 255 apart
  on the outermost rows and columns, 1 elsewhere.
- EXIF orientation is ignored, as by torchvision's ImageFolder.
"""
import numpy as np
from nvidia.dali import fn, math, pipeline_def, types

from fastdisco import dist
from fastdisco.views import Crop

TRIES = 10  # of a random crop before the centre crop

# One view's draws, [ROWS,2].  The two columns of a try hold the same draw, once for the height and once for the width.
AREA, RATIO, PLACE, LIGHT, COLOUR, BLUR, COINS, ROWS = 0, TRIES, 2 * TRIES, 2 * TRIES + 1, 2 * TRIES + 2, 2 * TRIES + 3, 2 * TRIES + 4, 2 * TRIES + 6


def train(crops: tuple[Crop, ...], reader: dict, seed: int, device: str, first: int = 0, **pipe):
    """Pipeline whose outputs are the views [S,S,3] float32 of each crop, then the reader's label.

    reader  arguments of fn.readers.file, whose labels are the words of the images in an epoch, see `words`; or of fn.readers.webdataset and
            words [batches,B,1] int32
    device  cpu, or gpu: decoded by `mixed`, everything on pixels on the GPU
    first   number of the first crop among the method's views, which its draws are hashed from"""
    return _train(crops, reader, seed, device, first, **pipe)


def words(index: np.ndarray, epoch: int) -> np.ndarray:
    """int32: what all draws of an image in an epoch are hashed from; `indices` undoes it."""
    return (index.astype(np.uint32) ^ _word(epoch)).view(np.int32)


def indices(words: np.ndarray, epoch: int) -> np.ndarray:
    return (words.view(np.uint32) ^ _word(epoch)).astype(np.int64)


def _word(epoch: int) -> np.uint32:
    return np.uint32(epoch * 0x9E3779B1 % 2**32)  # odd: an image has another word in every epoch


def evaluate(resize: int, size: int, mean, std, reader: dict, device: str, **pipe):
    """Pipeline of one view [size,size,3] float32 and the reader's label: short side to `resize`, centre crop, as torchvision rounds."""
    return _evaluate(resize, size, mean, std, reader, device, **pipe)


def decode(source, device: str, **pipe):
    """Pipeline that only decodes what source() returns, encoded images as uint8 arrays: which are unreadable?"""
    return _decode(source, device, **pipe)


@pipeline_def(enable_conditionals=True)
def _train(crops, reader, seed, device, first):
    encoded, label = _read(reader)
    image, hw = _decoded(encoded, device)
    draws = _draws(crops, label, seed, first)
    start, shape = _boxes(hw, draws, crops)
    heads = _coins(draws, crops)
    views = []
    for v, crop in enumerate(crops):
        x = fn.slice(image, start=start[v, 0], shape=shape[v, 0], axes=[0, 1])
        x = fn.resize(x, size=[crop.size, crop.size])
        views.append(_augment(x, crop, draws, heads, v, device))
    return *views, label


@pipeline_def
def _evaluate(resize, size, mean, std, reader, device):
    encoded, label = _read(reader)
    image, hw = _decoded(encoded, device)
    hw = fn.cast(hw, dtype=types.INT64)
    new = hw * resize // fn.reductions.min(hw)
    spare = new - size
    half = spare // 2
    start = half + (spare - 2 * half) * (half - half // 2 * 2)  # spare / 2, a half rounded to even as Python's round does
    x = fn.resize(image, size=fn.cast(new, dtype=types.FLOAT))
    x = fn.slice(x, start=fn.cast(start, dtype=types.INT32), shape=[size, size], axes=[0, 1])
    return _normalise(x, mean, std), label


@pipeline_def
def _decode(source, device):
    return _decoded(fn.external_source(source=source, batch=True, dtype=types.UINT8, ndim=1), device)[0]


def _read(reader):
    """Encoded images and their words, [1] int32, in the reader's order: of files, or of samples in tars."""
    if "files" in reader:
        return fn.readers.file(**reader)
    words = reader["words"]

    def batch(i):
        return words[i % len(words)]  # the reader, too, begins anew after the last

    # a shorter tar than its index says is an error of the reader with dont_use_mmap, and a segmentation fault without
    encoded = fn.readers.webdataset(paths=reader["paths"], index_paths=reader["index_paths"], ext=["img"], dont_use_mmap=True,
                                    missing_component_behavior="error", name="Reader")
    return encoded, fn.external_source(source=batch, batch=True, dtype=types.INT32, ndim=1)


def _decoded(encoded, device):
    """Image [H,W,3] uint8 and its (H, W) as float32 [2], which is on the CPU for either device."""
    if device == "cpu":
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
        shape = image.shape(dtype=types.FLOAT)
    else:
        # without fancy upsampling the chroma differs from the CPU's
        image = fn.decoders.image(encoded, device="mixed", output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True)
        shape = fn.peek_image_shape(encoded, dtype=types.FLOAT, adjust_orientation=False)
    return image, shape[0:2]


def _draws(crops, word, seed, first=0):
    """[V,ROWS,2] float32: each in its range, uniform.  All views at once, since small operators cost the same for any width."""
    const = lambda x: types.Constant(x, dtype=types.UINT32)
    x = fn.reinterpret(word, dtype=types.UINT32) + types.Constant(salts(seed, len(crops), first))
    x = x ^ x // const(1 << 16)  # MurmurHash3's finaliser, less its last step, which only moves the low bits; DALI has no shift
    x = x * const(0x85EBCA6B)
    x = x ^ x // const(1 << 13)
    x = x * const(0xC2B2AE35)
    low, high = ranges(crops)
    return x * types.Constant((high - low) * np.float32(2**-32)) + types.Constant(low)


def salts(seed: int, views: int, first: int = 0) -> np.ndarray:
    """[V,ROWS,2] uint32: one constant per draw; the columns of a try share theirs."""
    out = np.array([[[dist.mix(seed, v, r, c * (r >= PLACE)) % 2**32 for c in range(2)] for r in range(ROWS)] for v in range(first, first + views)])
    return out.astype(np.uint32)


def ranges(crops) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end of every draw, [V,ROWS,2] float32."""
    both = np.zeros((2, len(crops), ROWS, 2))
    both[1] = 1  # places and coins
    for low, high, c in zip(both[0], both[1], crops):
        low[AREA:RATIO], high[AREA:RATIO] = c.scale
        ratio = np.log(c.ratio)
        low[RATIO:PLACE], high[RATIO:PLACE] = np.outer(ratio, (-1, 1))  # of height / width, and of its inverse
        for at, j in zip(((LIGHT, 0), (LIGHT, 1), (COLOUR, 0)), c.jitter):
            low[at], high[at] = max(0, 1 - j), 1 + j
        low[COLOUR, 1], high[COLOUR, 1] = -360 * c.jitter[3], 360 * c.jitter[3]  # degrees
        low[BLUR, 0], high[BLUR, 0] = np.maximum(c.blur_sigma, 1e-3)  # no blur; DALI refuses 0
    return both[0].astype(np.float32), both[1].astype(np.float32)


def _boxes(hw, draws, crops):
    """Start and shape of each view's crop, [V,1,2] int32 (height, width): the first of ten tries that lies in the image.

    torchvision's RandomResizedCrop: share of the area and log of the ratio uniform, sides rounded; where no try fits, the centre crop
    of the nearest ratio."""
    h, w = hw[0], hw[1]
    tries = math.floor(math.sqrt(draws[:, AREA:RATIO] * (h * w) * math.exp(draws[:, RATIO:PLACE])) + 0.5)  # [V,10,2]
    widest = np.array([[[1 / c.ratio[0], c.ratio[1]]] for c in crops], np.float32)
    centre = math.max(math.min(math.floor(fn.stack(w, h) * types.Constant(widest) + 0.5), hw), 1.0)  # [V,1,2], fits always
    sides = fn.cat(tries, centre, axis=1)
    rank = types.Constant(np.arange(TRIES, -1, -1, dtype=np.float32)[:, None] + 1)
    score = fn.reductions.min((sides <= hw) * (sides > 0.5) * rank, axes=2, keep_dims=True)  # [V,11,1]: 0 where it does not fit
    best = fn.reductions.max(score, axes=1, keep_dims=True)
    shape = fn.reductions.sum(sides * (score == best), axes=1, keep_dims=True)
    drawn = best > 1.5  # [V,1,1]: not the centre crop
    spare = hw - shape
    place = (draws[:, PLACE:LIGHT] - 0.5) * drawn + 0.5
    start = math.min(math.floor(place * (spare + drawn)), spare)  # of a draw that is 1, spare + 1
    return fn.cast(start, dtype=types.INT32), fn.cast(shape, dtype=types.INT32)


def _coins(draws, crops):
    """[V,3,2] int32, 1 for heads: ((-, brightness and contrast first), (jitter, gray), (blur, flip))."""
    chance = np.array([[[0, 0.5], [c.jitter_p, c.gray_p], [c.blur_p, c.flip_p]] for c in crops], np.float32)
    return draws[:, BLUR:ROWS] < types.Constant(chance)


def _augment(x, crop, draws, heads, v, device):
    """A resized crop [S,S,3] uint8 -> the normalised view.  What has chance 0 is not in the graph, what has 1 needs no coin."""
    if crop.jitter_p == 1:
        x = _jitter(x, draws, heads, v, device)
    elif crop.jitter_p > 0:
        if heads[v, 1, 0]:
            x = _jitter(x, draws, heads, v, device)
    if crop.gray_p == 1:
        x = _gray(x)
    elif crop.gray_p > 0:
        if heads[v, 1, 1]:
            x = _gray(x)
    if crop.blur_p == 1:
        x = fn.gaussian_blur(x, sigma=draws[v, BLUR, 0])
    elif crop.blur_p > 0:
        if heads[v, 2, 0]:
            x = fn.gaussian_blur(x, sigma=draws[v, BLUR, 0])
    return _normalise(x, crop.mean, crop.std, mirror=fn.cast(heads[v, 2, 1], dtype=types.INT32))


def _jitter(x, draws, heads, v, device):
    b, c, s, h = draws[v, LIGHT, 0], draws[v, LIGHT, 1], draws[v, COLOUR, 0], draws[v, COLOUR, 1]
    if heads[v, 0, 1]:
        x = _light(x, b, c, device)
        x = fn.hsv(x, saturation=s, hue=h)
    else:
        x = fn.hsv(x, saturation=s, hue=h)
        x = _light(x, b, c, device)
    return x


def _light(x, b, c, device):
    """b * (c * (x - m) + m) with the mean m of the grey picture: brightness b, then contrast c about the mean it left."""
    mean = fn.reductions.mean(fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY))
    if device == "cpu":
        return fn.brightness_contrast(x, brightness=b, contrast=c, contrast_center=mean)
    return _light_of_mean(x, b.gpu(), c.gpu(), mean)  # an argument cannot come from the GPU, where the mean is


def _light_of_mean(x, b, c, mean):
    return fn.cast(math.clamp(x * (b * c) + mean * (b - b * c), 0.0, 255.0), dtype=types.UINT8)


def _gray(x):
    x = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    return fn.color_space_conversion(x, image_type=types.GRAY, output_type=types.RGB)


def _normalise(x, mean, std, mirror=0):
    """[H,W,3] uint8 -> float32; channels stay last, so the batch is a channels_last tensor of the network without a copy."""
    mean, std = [255 * m for m in mean], [255 * s for s in std]
    return fn.crop_mirror_normalize(x, dtype=types.FLOAT, output_layout="HWC", mean=mean, std=std, mirror=mirror)
