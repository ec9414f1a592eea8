"""What all blocks of the configuration have in common."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, field_validator

from fastdisco.common.files import expanded


class Block(BaseModel, extra="forbid", frozen=True, validate_default=True):
    """A group of keys: fixed once made, and it refuses keys that it does not have.

    In its paths, ~ and environment variables are replaced."""

    @field_validator("*", mode="after")
    @classmethod
    def _expand_paths(cls, value: Any) -> Any:
        return expanded(value) if isinstance(value, Path) else value
