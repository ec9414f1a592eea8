"""What a view is: one random crop of an image and its augmentation, as values."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fastdisco.config.block import Block, Float, Int


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the smaller number comes first, as in [{pair[1]:g}, {pair[0]:g}]")
    return pair


Positive = Annotated[Float, Field(gt=0)]
# Beyond these bounds a view shows nothing of its image.  A blur takes time with its sigma, too.
Share = Annotated[Float, Field(ge=1e-4, le=1)]
Ratio = Annotated[Float, Field(ge=0.01, le=100)]
Strength = Annotated[Float, Field(ge=0, le=10)]
Sigma = Annotated[Float, Field(ge=0, le=100)]
Hue = Annotated[Float, Field(ge=0, le=0.5)]


class Crop(Block):
    """One view; a `*_p` is the chance that the step is applied.

    The defaults are MoCo-v2's augmentation, arXiv:2003.04297.  The data pipelines read nothing else
    of the configuration."""

    # Side of the square that comes out, pixels.
    size: Int = Field(224, ge=8)
    # The crop's area as a share of the image's area: smallest and largest.
    scale: Annotated[tuple[Share, Share], AfterValidator(_ascending)] = (0.2, 1.0)
    # The crop's width / height: smallest and largest.
    ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(_ascending)] = (3 / 4, 4 / 3)
    # Mirror left and right.
    flip_p: Float = Field(0.5, ge=0, le=1)
    # Change the colours.
    jitter_p: Float = Field(0.8, ge=0, le=1)
    # How strongly: brightness, contrast and saturation are multiplied by up to 1 +- this, hue is
    # turned by up to this part of the colour circle.
    jitter: tuple[Strength, Strength, Strength, Hue] = (0.4, 0.4, 0.4, 0.1)
    # Make it grey.
    gray_p: Float = Field(0.2, ge=0, le=1)
    # Blur with a Gaussian.
    blur_p: Float = Field(0.5, ge=0, le=1)
    # The Gaussian's standard deviation, pixels: smallest and largest.
    blur_sigma: Annotated[tuple[Sigma, Sigma], AfterValidator(_ascending)] = (0.1, 2.0)
    # Solarise, after all other steps: a value v of 0..255 that is 128 or more becomes 255 - v.
    solarize_p: Float = Field(0.0, ge=0, le=1)
    # How the crop is resized; both are antialiased.
    interpolation: Literal["linear", "cubic"] = "linear"
    # The view is normalised at the end: (v - mean) / std, with v in 0..1, for red, green, blue.
    mean: tuple[Float, Float, Float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)


class Crops(Crop):
    """A group of `count` views of one kind.

    What a group does not set is as in the configuration's block `view`: `config.crops` puts them
    together."""

    count: Int = Field(1, ge=1, le=1024)
