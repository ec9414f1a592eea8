"""What all blocks of the configuration have in common."""

from pydantic import BaseModel


class Block(BaseModel, extra="forbid", frozen=True, validate_default=True):
    """A group of keys: fixed once made, and it refuses keys that it does not have."""
