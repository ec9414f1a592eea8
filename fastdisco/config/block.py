"""What every block of the configuration has in common."""

from pydantic import BaseModel


class Block(BaseModel, extra="forbid", frozen=True, validate_default=True):
    pass
