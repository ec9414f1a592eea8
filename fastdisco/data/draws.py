"""Every random draw of a view, hashed from (seed, epoch, image index, view).

No draw comes from a stream, so neither batch size, rank, order, threads nor a restart changes an
image's views.  The draws are made in NumPy, ahead of DALI's graph, since the loader knows which
image comes when.

  words    one 32-bit word for each image and epoch
  salts    one constant for each draw of a view
  draws    hash of word + salt, scaled to the draw's range
  of_view  draws under the names that the graph uses

Shapes: B images, V views (one a crop), ROWS x 2 draws of a view, K taps of a blur."""

import functools

import numpy as np

from fastdisco.common import dist
from fastdisco.config import Crop

TRIES = 10  # of a random crop, before the centre crop

# The rows of one view's draws [ROWS,2].  A row's number enters its hash, so new rows come last.
AREA = 0  # TRIES rows: share of the image's area, the same draw in both columns
RATIO = TRIES  # TRIES rows: log of the crop's ratio, for height and (the same draw) for width
PLACE = 2 * TRIES  # the crop's place, vertical and horizontal
LIGHT = PLACE + 1  # brightness, contrast
COLOUR = PLACE + 2  # saturation, hue
BLUR = PLACE + 3  # sigma; a coin: light before colour
# Three rows of coins: jitter, gray; blur, flip; solarize, one that nobody takes.
ROWS = PLACE + 7


def feed(
    crops: tuple[Crop, ...], seed: int, words: np.ndarray, device: str, first: int = 0
) -> list[np.ndarray]:
    """What the graph takes of each image.

    words  [B] uint32
    first  number of the first crop among the method's views
    Returns the sides of the tries as shares of sqrt(H W), [B,V,TRIES,2] (height, width); their
    place as a share of the free room, [B,V,1,2]; and for each view what `names` says."""
    d = draws(crops, seed, words, first)
    area, ratio = d[:, :, AREA:RATIO], np.exp(d[:, :, RATIO:PLACE])
    out = [np.sqrt(area * ratio), d[:, :, PLACE:LIGHT]]
    for v, crop in enumerate(crops):
        one = of_view(crop, d[:, v])
        out += [one[name] for name in names(crop, device)]
    return [np.ascontiguousarray(x) for x in out]


def names(crop: Crop, device: str) -> list[str]:
    """What a view's graph takes of `of_view`.  A step of chance 0 takes nothing, one of chance 1
    needs no coin."""
    taken = []
    if crop.jitter_p:
        taken += ["brightness", "contrast", "saturation", "hue", "light_first"]
    if crop.blur_p:
        taken += ["sigma"] if device == "gpu" else ["across", "down"]
    coins = dict(
        jitter=crop.jitter_p,
        # With jitter, grey is a saturation of 0: the coin is for images that get no jitter.
        gray=crop.gray_p * (crop.jitter_p < 1),
        blur=crop.blur_p,
        solarize=crop.solarize_p,
    )
    taken += [name for name, p in coins.items() if 0 < p < 1]
    return [*taken, "flip"]


def of_view(crop: Crop, d: np.ndarray) -> dict[str, np.ndarray]:
    """Draws of one view [B,ROWS,2] by name.

    Hue is in degrees, sigma in pixels.  across [B,1,K] and down [B,K,1] are the blur's Gaussian.
    The rest are coins.  A grey picture has saturation 0: the colour step, where there is one, makes
    it grey."""
    after_place = d[:, LIGHT:ROWS].transpose(1, 2, 0)  # [6,2,B]
    light, colour, blur, *coins = after_place
    (brightness, contrast), (saturation, hue), (sigma, light_first) = light, colour, blur
    (jitter, gray), (blur_coin, flip), (solarize, _) = coins
    is_gray, taps = gray < crop.gray_p, gaussian(sigma, crop)
    return dict(
        brightness=brightness,
        contrast=contrast,
        saturation=saturation * ~is_gray,
        hue=hue,
        sigma=sigma,
        across=taps[:, None],
        down=taps[:, :, None],
        light_first=light_first < 0.5,
        jitter=jitter < crop.jitter_p,
        gray=is_gray,
        blur=blur_coin < crop.blur_p,
        flip=(flip < crop.flip_p).astype(np.int32),
        solarize=solarize < crop.solarize_p,
    )


def draws(crops: tuple[Crop, ...], seed: int, words: np.ndarray, first: int = 0) -> np.ndarray:
    """[B,V,ROWS,2] float32, each draw uniform in its range; arguments as of `feed`."""
    # MurmurHash3's finaliser of word + salt, modulo 2^32, without its last step, which only moves
    # the low bits.
    x = words.reshape(-1, 1, 1, 1) + salts(seed, len(crops), first)
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    # A float32 holds 24 bits, so the largest x become 2^32 and a draw can equal its high end.
    low, high = ranges(crops)
    return x.astype(np.float32) * ((high - low) * np.float32(2**-32)) + low


def words(index: np.ndarray, epoch: int) -> np.ndarray:
    """[B] uint32: what all draws of an image in an epoch are hashed from."""
    # The factor is odd, so an image has another word in each of 2^32 epochs.
    return index.astype(np.uint32) ^ np.uint32(epoch * 0x9E3779B1 % 2**32)


@functools.cache
def salts(seed: int, views: int, first: int = 0) -> np.ndarray:
    """[V,ROWS,2] uint32: one constant for each draw; the two columns of a try share theirs."""
    out = np.zeros((views, ROWS, 2), np.uint32)
    for v, row, column in np.ndindex(out.shape):
        own = column if row >= PLACE else 0
        out[v, row, column] = dist.mix(seed, first + v, row, own) % 2**32
    return out


@functools.cache
def ranges(crops: tuple[Crop, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end of every draw, each [V,ROWS,2] float32."""
    # Places and coins are in 0..1.
    lows, highs = np.zeros((len(crops), ROWS, 2)), np.ones((len(crops), ROWS, 2))
    for low, high, crop in zip(lows, highs, crops):
        low[AREA:RATIO], high[AREA:RATIO] = crop.scale
        # The crop's ratio is width / height: so minus its log for the height, plus for the width.
        ratio = np.log(crop.ratio)
        low[RATIO:PLACE], high[RATIO:PLACE] = np.outer(ratio, (-1, 1))
        *factors, hue = crop.jitter
        for at, j in zip(((LIGHT, 0), (LIGHT, 1), (COLOUR, 0)), factors):
            low[at], high[at] = max(0, 1 - j), 1 + j
        low[COLOUR, 1], high[COLOUR, 1] = -360 * hue, 360 * hue  # turns to degrees
        # So small a sigma does not blur; DALI refuses 0.
        low[BLUR, 0], high[BLUR, 0] = np.maximum(crop.blur_sigma, 1e-3)
    return lows.astype(np.float32), highs.astype(np.float32)


def gaussian(sigma: np.ndarray, crop: Crop) -> np.ndarray:
    """[B,K] float32 with sums 1: the Gaussian of each sigma [B], cut at 3 sigma.  K is what the
    crop's largest sigma needs."""
    reach = np.ceil(3 * sigma)[:, None]
    most = int(np.ceil(3 * max(crop.blur_sigma)))
    at = np.arange(-most, most + 1, dtype=np.float32)
    taps = np.exp(-0.5 * (at / sigma[:, None]) ** 2) * (abs(at) <= reach)
    return taps / taps.sum(1, keepdims=True)
