"""The DALI graphs: an image's views, whose every random parameter is hashed from (seed, epoch, index, view), and the evaluation's view.

The semantics are torchvision's; what differs:
- Hue rotates in YIQ as DALI does it, not in HSV: same sign and unit, up to 22 of 255 in the mean at the largest angle of 0.1 turns.
- Brightness, contrast | saturation, hue come in these pairs, in one of two orders (torchvision: 24 orders), with one rounding a pair.
- Resizing a crop reads the few pixels around it that its filter reaches, where torchvision repeats the crop's border.
- EXIF orientation is ignored, as torchvision's ImageFolder ignores it."""
import numpy as np

from fastdisco.config import UserError
from fastdisco.views import Crop

TRIES = 10  # of RandomResizedCrop
# Columns of a view's row of uniforms
AREA, RATIO = slice(0, TRIES), slice(TRIES, 2 * TRIES)
TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, BLUR, SIGMA = range(2 * TRIES, 2 * TRIES + 12)
COLUMNS = 2 * TRIES + 12


def dali():
    """nvidia.dali, or a UserError that says how to get it."""
    try:
        import nvidia.dali as found
        import nvidia.dali.fn  # noqa: F401
        import nvidia.dali.types  # noqa: F401
    except ImportError as e:
        raise UserError(f"NVIDIA DALI cannot be imported ({e}); pip install 'fastdisco[cuda13]', or 'fastdisco[cuda12]' for CUDA 12; "
                        "both run without a GPU") from None
    return found


def train_pipeline(root: str, files: list[str], numbers: list[int], images: int, first_epoch: int, crops: tuple[Crop, ...], seed: int, batch: int,
                   threads: int, gpu: int | None):
    """A pipeline that decodes `files` in their order, each once, and gives its views [S,S,3] float32 normalised, then its number int32 [1].

    numbers  a file's epoch, counted from first_epoch, times `images` (of the whole listing) plus its index
    gpu      device id, or None: everything on the CPU"""
    d = dali()
    fn, types = d.fn, d.types
    device = "cpu" if gpu is None else "gpu"

    @d.pipeline_def(batch_size=batch, num_threads=threads, device_id=gpu, seed=0, prefetch_queue_depth=2, enable_conditionals=True)
    def graph():
        encoded, number = fn.readers.file(file_root=root, files=files, labels=numbers, name="Reader")
        shape = fn.peek_image_shape(encoded, adjust_orientation=False)
        image = fn.decoders.image(encoded, device="cpu" if gpu is None else "mixed", output_type=types.RGB, adjust_orientation=False)
        u = _uniforms(d, number, images, first_epoch, seed, len(crops))  # [V,COLUMNS]
        start, end = _boxes(d, u, shape, crops)  # [V,2] each: rows, columns
        views = []
        for v, crop in enumerate(crops):
            x = fn.resize(image, size=[crop.size, crop.size], roi_start=start[v], roi_end=end[v], interp_type=types.INTERP_LINEAR, antialias=True)
            x = _colour(d, x, _scale(d, u[v], crop), crop, device)
            mirror = fn.cast(u[v, FLIP] < crop.flip_p, dtype=types.INT32)
            views.append(_normalise(d, x, crop.mean, crop.std, mirror=mirror))
        return (*views, number)

    return graph()


def eval_pipeline(root: str, files: list[str], numbers: list[int], resize: int, size: int, mean, std, batch: int, threads: int, gpu: int | None):
    """A pipeline that gives [S,S,3] float32: short side to `resize`, centre crop, normalised; then the file's number int32 [1]."""
    d = dali()
    fn, types = d.fn, d.types

    @d.pipeline_def(batch_size=batch, num_threads=threads, device_id=gpu, seed=0, prefetch_queue_depth=2)
    def graph():
        encoded, number = fn.readers.file(file_root=root, files=files, labels=numbers, name="Reader")
        x = fn.decoders.image(encoded, device="cpu" if gpu is None else "mixed", output_type=types.RGB, adjust_orientation=False)
        x = fn.resize(x, resize_shorter=resize, interp_type=types.INTERP_LINEAR, antialias=True)
        return _normalise(d, x, mean, std, crop=(size, size)), number

    return graph()


def salts(seed: int, views: int) -> np.ndarray:
    """uint32 [V,COLUMNS]: what tells the columns and views of one image apart."""
    return np.random.Generator(np.random.Philox(seed)).integers(2**32, size=(64, COLUMNS), dtype=np.uint32)[:views]


def _uniforms(d, number, images: int, first_epoch: int, seed: int, views: int):
    """[V,COLUMNS] float32 in 0..1, 24 bits each: the hash of (seed, epoch, index, view, column)."""
    u32 = lambda n: d.types.Constant(np.uint32(n & 0xFFFFFFFF))  # noqa: E731
    epoch = number // images
    index = d.fn.cast(number - epoch * images, dtype=d.types.UINT32)
    epoch = d.fn.cast(epoch, dtype=d.types.UINT32) + u32(first_epoch)
    x = _mix(_mix(index ^ u32(seed), u32) + epoch * u32(0x9E3779B9), u32)
    x = _mix(x ^ d.types.Constant(salts(seed, views)), u32)
    return d.fn.cast(x // u32(256), dtype=d.types.FLOAT) * np.float32(2**-24)


def _mix(x, u32):
    """A 32-bit finaliser of two multiplications; division is the shift that DALI has."""
    x = (x ^ x // u32(2**16)) * u32(0x7FEB352D)
    x = (x ^ x // u32(2**15)) * u32(0x846CA68B)
    return x ^ x // u32(2**16)


def _boxes(d, u, shape, crops: tuple[Crop, ...]):
    """RandomResizedCrop of every view: corners [V,2] (row, column) of the first of ten tries that fits, else of the central fallback."""
    fn, math = d.fn, d.math
    constant = lambda values: d.types.Constant(np.array(values, dtype=np.float32))  # noqa: E731
    scale, log_ratio = np.array([c.scale for c in crops]), np.log([c.ratio for c in crops])
    span = lambda x, r: x * constant(r[:, 1:] - r[:, :1]) + constant(r[:, :1])  # noqa: E731
    size = fn.cast(shape, dtype=d.types.FLOAT)
    high, wide = size[0], size[1]
    area = span(u[:, AREA], scale) * (high * wide)  # [V,TRIES]
    ratio = math.exp(span(u[:, RATIO], log_ratio))
    w, h = math.floor(math.sqrt(area * ratio) + 0.5), math.floor(math.sqrt(area / ratio) + 0.5)
    fits = fn.cast((w > 0) & (w <= wide) & (h > 0) & (h <= high), dtype=d.types.FLOAT)
    order = fits * constant(np.arange(TRIES, 0, -1))
    first = fits * fn.cast(order == fn.reductions.max(order, axes=1, keep_dims=True), dtype=d.types.FLOAT)  # one-hot, or nothing
    none = 1.0 - fn.reductions.sum(first, axes=1)  # [V]
    w = fn.reductions.sum(w * first, axes=1) + none * math.min(wide, math.floor(high * constant(np.exp(log_ratio[:, 1])) + 0.5))
    h = fn.reductions.sum(h * first, axes=1) + none * math.min(high, math.floor(wide / constant(np.exp(log_ratio[:, 0])) + 0.5))
    top = (1.0 - none) * math.floor(u[:, TOP] * (high - h + 1.0)) + none * math.floor((high - h) * 0.5)
    left = (1.0 - none) * math.floor(u[:, LEFT] * (wide - w + 1.0)) + none * math.floor((wide - w) * 0.5)
    return fn.stack(top, left, axis=1), fn.stack(top + h, left + w, axis=1)


def _scale(d, u, crop: Crop):
    """A view's row [COLUMNS] with brightness, contrast, saturation (factors), hue (degrees) and blur (pixels) in their ranges."""
    low, high = np.zeros(COLUMNS, np.float32), np.ones(COLUMNS, np.float32)
    b, c, s, h = crop.jitter
    for column, amount in ((BRIGHTNESS, b), (CONTRAST, c), (SATURATION, s)):
        low[column], high[column] = max(0.0, 1 - amount), 1 + amount
    low[HUE], high[HUE] = -360 * h, 360 * h
    low[SIGMA], high[SIGMA] = crop.blur_sigma
    return u * d.types.Constant(high - low) + d.types.Constant(low)


def _colour(d, x, p, crop: Crop, device: str):
    """Jitter, grey and blur, each on the images whose coin says so; p [COLUMNS] are the parameters."""
    if crop.jitter_p > 0 and any(crop.jitter):
        if p[JITTER] < crop.jitter_p:
            x = _jitter(d, x, p, device)
    if crop.gray_p > 0:
        if p[GRAY] < crop.gray_p:
            x = _gray(d, x)
    if crop.blur_p > 0:
        if p[BLUR] < crop.blur_p:
            x = d.fn.gaussian_blur(x, sigma=p[SIGMA])
    return x


def _jitter(d, x, p, device):
    if p[ORDER] < 0.5:
        x = _saturation_hue(d, _brightness_contrast(d, x, p[BRIGHTNESS], p[CONTRAST], device), p)
    else:
        x = _brightness_contrast(d, _saturation_hue(d, x, p), p[BRIGHTNESS], p[CONTRAST], device)
    return x


def _brightness_contrast(d, x, b, c, device: str):
    """b (m + c (x - m)), m the mean grey of x: torchvision's brightness, then its contrast."""
    m = d.fn.reductions.mean(x, axes=[0, 1])  # [3]
    weights = d.types.Constant(np.array([0.299, 0.587, 0.114], np.float32))
    if device == "cpu":
        return d.fn.brightness_contrast(x, brightness=b, contrast=c, contrast_center=d.fn.reductions.sum(m * weights))
    return blend(d, x, d.fn.reductions.sum(m * d.types.Constant(weights.value, device="gpu")), b.gpu(), c.gpu())


def blend(d, x, m, b, c):
    """The same by arithmetic: on a GPU an operator's arguments cannot be computed there."""
    return d.fn.cast(d.math.clamp(x * (b * c) + m * (b - b * c) + 0.5, 0.0, 255.0), dtype=d.types.UINT8)


def _saturation_hue(d, x, p):
    return d.fn.hsv(x, saturation=p[SATURATION], hue=p[HUE])


def _gray(d, x):
    gray = d.fn.color_space_conversion(x, image_type=d.types.RGB, output_type=d.types.GRAY)
    return d.fn.color_space_conversion(gray, image_type=d.types.GRAY, output_type=d.types.RGB)


def _normalise(d, x, mean, std, **more):
    return d.fn.crop_mirror_normalize(x, dtype=d.types.FLOAT, output_layout="HWC", mean=[255 * m for m in mean], std=[255 * s for s in std], **more)
