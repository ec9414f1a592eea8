"""Every random draw of a view, hashed from (seed, epoch, image index, view) and never taken from a
stream: neither batch size, rank, order, threads nor a restart changes an image's views.  In NumPy
and ahead of DALI's graph, since the loader knows what comes when."""

import functools

import numpy as np

from fastdisco.common import dist
from fastdisco.config import Crop

TRIES = 10  # of a random crop before the centre crop

# One view's draws, [ROWS,2].  The two columns of a try hold the same draw, once for the height and
# once for the width. A row's number enters its hash: new ones come last. After the blur's come
# three rows of coins.
AREA, RATIO, PLACE, LIGHT, COLOUR, BLUR, ROWS = (
    0,
    TRIES,
    2 * TRIES,
    2 * TRIES + 1,
    2 * TRIES + 2,
    2 * TRIES + 3,
    2 * TRIES + 7,
)


def feed(
    crops: tuple[Crop, ...], seed: int, words: np.ndarray, device: str, first: int = 0
) -> list[np.ndarray]:
    """What the graph takes of each image, [B,...]: sides of the tries as shares of sqrt(H W),
    [V,TRIES,2] (height, width), their place as a share of the free room, [V,1,2], and for each view
    what `names` says.  first: number of the first crop among the method's views."""
    d = draws(crops, seed, words, first)
    out = [np.sqrt(d[:, :, AREA:RATIO] * np.exp(d[:, :, RATIO:PLACE])), d[:, :, PLACE:LIGHT]]
    for v, crop in enumerate(crops):
        one = of_view(crop, d[:, v])
        out += [one[name] for name in names(crop, device)]
    return [np.ascontiguousarray(x) for x in out]


def names(crop: Crop, device: str) -> list[str]:
    """What a view's graph takes; what has chance 0 or 1 needs no coin."""
    light, blur = (
        ("brightness", "contrast", "saturation", "hue", "light_first"),
        ("sigma",) if device == "gpu" else ("across", "down"),
    )
    parts = (crop.jitter_p, light), (crop.blur_p, blur)
    coins = dict(
        jitter=crop.jitter_p,
        gray=crop.gray_p * (crop.jitter_p < 1),
        blur=crop.blur_p,
        solarize=crop.solarize_p,
    )
    return (
        [n for p, some in parts if p for n in some]
        + [n for n, p in coins.items() if 0 < p < 1]
        + ["flip"]
    )


def of_view(crop: Crop, d: np.ndarray) -> dict[str, np.ndarray]:
    """Draws of one view [B,ROWS,2] by name.  Hue in degrees, sigma in pixels; across [B,1,K] and
    down [B,K,1] are the blur's Gaussian; the rest are coins.  Of a grey picture the saturation is
    0: so the colour step, where there is one, makes it grey."""
    (b, c), (s, h), (sigma, light_first), (jitter, gray), (blur, flip), (solarize, _) = d[
        :, LIGHT:ROWS
    ].transpose(1, 2, 0)
    gray, taps = gray < crop.gray_p, gaussian(sigma, crop)
    return dict(
        brightness=b,
        contrast=c,
        saturation=s * ~gray,
        hue=h,
        sigma=sigma,
        across=taps[:, None],
        down=taps[:, :, None],
        light_first=light_first < 0.5,
        jitter=jitter < crop.jitter_p,
        gray=gray,
        blur=blur < crop.blur_p,
        flip=(flip < crop.flip_p).astype(np.int32),
        solarize=solarize < crop.solarize_p,
    )


def draws(crops: tuple[Crop, ...], seed: int, words: np.ndarray, first: int = 0) -> np.ndarray:
    """[B,V,ROWS,2] float32: each in its range, uniform."""
    x = words.reshape(-1, 1, 1, 1) + salts(seed, len(crops), first)
    x ^= x >> 16  # MurmurHash3's finaliser, less its last step, which only moves the low bits
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    low, high = ranges(crops)
    return x.astype(np.float32) * ((high - low) * np.float32(2**-32)) + low


def words(index: np.ndarray, epoch: int) -> np.ndarray:
    """uint32: what all draws of an image in an epoch are hashed from."""
    # Odd: an image has another word in every epoch.
    return index.astype(np.uint32) ^ np.uint32(epoch * 0x9E3779B1 % 2**32)


@functools.cache
def salts(seed: int, views: int, first: int = 0) -> np.ndarray:
    """[V,ROWS,2] uint32: one constant per draw; the columns of a try share theirs."""
    out = np.array(
        [
            [
                [dist.mix(seed, v, r, c * (r >= PLACE)) % 2**32 for c in range(2)]
                for r in range(ROWS)
            ]
            for v in range(first, first + views)
        ]
    )
    return out.astype(np.uint32)


@functools.cache
def ranges(crops: tuple[Crop, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end of every draw, [V,ROWS,2] float32."""
    both = np.zeros((2, len(crops), ROWS, 2))
    both[1] = 1  # places and coins
    for low, high, c in zip(both[0], both[1], crops):
        low[AREA:RATIO], high[AREA:RATIO] = c.scale
        ratio = np.log(c.ratio)
        # Of height / width, and of its inverse.
        low[RATIO:PLACE], high[RATIO:PLACE] = np.outer(ratio, (-1, 1))
        for at, j in zip(((LIGHT, 0), (LIGHT, 1), (COLOUR, 0)), c.jitter):
            low[at], high[at] = max(0, 1 - j), 1 + j
        low[COLOUR, 1], high[COLOUR, 1] = -360 * c.jitter[3], 360 * c.jitter[3]  # degrees
        low[BLUR, 0], high[BLUR, 0] = np.maximum(c.blur_sigma, 1e-3)  # no blur; DALI refuses 0
    return both[0].astype(np.float32), both[1].astype(np.float32)


def gaussian(sigma: np.ndarray, crop: Crop) -> np.ndarray:
    """[B,K] float32, sums 1: the Gaussian cut at 3 sigma, as wide as the crop's largest needs."""
    reach = np.ceil(3 * sigma)[:, None]
    most = int(np.ceil(3 * max(crop.blur_sigma)))
    at = np.arange(-most, most + 1, dtype=np.float32)
    taps = np.exp(-0.5 * (at / sigma[:, None]) ** 2) * (abs(at) <= reach)
    return taps / taps.sum(1, keepdims=True)
