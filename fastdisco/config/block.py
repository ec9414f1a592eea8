"""What all blocks of the configuration have in common, and the numbers in them."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, field_validator

from fastdisco.common.files import expanded

# Whole numbers up to here go through floats and through torch's sizes unchanged.
LARGEST = 2**53
# Everything is computed in float32; what lies outside would become 0 or infinite there.
TINY, HUGE = 2.0**-126, 2.0**127


def no_bool(value: Any) -> Any:
    """The value.  Raises ValueError for true and false, which pydantic takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def _fits(value: float) -> float:
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"no whole number above 2^53 = {LARGEST} is known here")
    if isinstance(value, float) and value and not TINY <= abs(value) <= HUGE:
        raise ValueError(
            "float32, in which all is computed, cannot hold it; take a number between 1e-37 and "
            "1e38, or 0"
        )
    return value


# The numbers of every block: true and false are none, and `Block` takes no infinity and no NaN.
Int = Annotated[int, BeforeValidator(no_bool), AfterValidator(_fits)]
Float = Annotated[float, BeforeValidator(no_bool), AfterValidator(_fits)]


# Of a softmax over cosines: below it is a maximum, above it all weights are alike.
Temperature = Annotated[Float, Field(ge=1e-5, le=100)]


class Block(BaseModel, extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False):
    """A group of keys: fixed once made, and it refuses keys that it does not have.

    In its paths, ~ and environment variables are replaced."""

    @field_validator("*", mode="after")
    @classmethod
    def _expand_paths(cls, value: Any) -> Any:
        return expanded(value) if isinstance(value, Path) else value
