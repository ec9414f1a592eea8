"""Addresses in object storage, s3://bucket/prefix and gs://bucket/prefix, where a path is expected.

pathlib makes one slash of two, so such an address arrives as s3:/bucket/prefix."""

import re
from pathlib import Path, PosixPath

_SCHEME = re.compile(r"(s3|gs):/+")


class Url(PosixPath):
    """A path that is an address: it has parents and names as others, and both slashes in texts."""

    __slots__ = ()

    def __str__(self) -> str:
        return _SCHEME.sub(r"\1://", super().__str__(), count=1)

    @property
    def scheme(self) -> str:
        """`s3` or `gs`."""
        return self.parts[0].removesuffix(":")

    @property
    def bucket(self) -> str:
        """The bucket's name; '' where the address has none."""
        return self.parts[1] if len(self.parts) > 1 else ""

    @property
    def prefix(self) -> str:
        """What keys of objects in this folder begin with: '' or with a slash at its end."""
        return "".join(f"{part}/" for part in self.parts[2:])


def addressed(path: Path | str) -> Path:
    """The path, as a Url where it is an address in object storage."""
    text = str(path)
    return Url(text) if _SCHEME.match(text) else Path(path)
