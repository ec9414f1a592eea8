"""What a view is: one random crop of an image with its augmentation, as data."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the smaller number comes first, as in [{pair[1]:g}, {pair[0]:g}]")
    return pair


NotNegative, Positive = Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]
Share, Hue = Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=0, le=0.5)]


class Crop(BaseModel, extra="forbid", frozen=True):
    """One view.  The defaults are MoCo-v2's augmentation, arXiv:2003.04297; the data pipelines read
    nothing else."""

    size: int = Field(224, ge=8)  # output side, pixels
    # Share of the image's area.
    scale: Annotated[tuple[Share, Share], AfterValidator(_ascending)] = (0.2, 1.0)
    # Width / height.
    ratio: Annotated[tuple[Positive, Positive], AfterValidator(_ascending)] = (3 / 4, 4 / 3)
    flip_p: float = Field(0.5, ge=0, le=1)
    jitter_p: float = Field(0.8, ge=0, le=1)
    # Brightness, contrast, saturation, hue (in turns)
    jitter: tuple[NotNegative, NotNegative, NotNegative, Hue] = (0.4, 0.4, 0.4, 0.1)
    gray_p: float = Field(0.2, ge=0, le=1)
    blur_p: float = Field(0.5, ge=0, le=1)
    # Pixels.
    blur_sigma: Annotated[tuple[NotNegative, NotNegative], AfterValidator(_ascending)] = (0.1, 2.0)
    # Values from 128 on become 255 - value, the last step.
    solarize_p: float = Field(0.0, ge=0, le=1)
    interpolation: Literal["linear", "cubic"] = "linear"  # of the resize, antialiased
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of values in 0..1
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)


class Crops(Crop):
    """`count` views alike.  What is not set here is as in the configuration's `view`, see
    config.crops."""

    count: int = Field(1, ge=1)
