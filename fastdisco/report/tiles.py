"""Small pictures of images: many in one sheet, so that the page stays small."""

import base64
import io

import numpy as np
from PIL import Image, ImageOps

from fastdisco.data import Listing

SIDE, COLUMNS = 40, 20
QUALITY = 70


class Sheet:
    """Thumbnails, each once; a tile's number says its place, row by row."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, int], int] = {}
        self._tiles: list[Image.Image] = []

    def __len__(self) -> int:
        return len(self._tiles)

    def add(self, listing: Listing, index: int) -> int:
        """The number of the image's tile: its centre square, grey where it cannot be read."""
        key = str(listing.source), index
        if key not in self._numbers:
            self._numbers[key] = len(self._tiles)
            self._tiles.append(square(listing, index, SIDE))
        return self._numbers[key]

    def uri(self) -> str:
        rows = max(1, -(-len(self._tiles) // COLUMNS))
        sheet = Image.new("RGB", (COLUMNS * SIDE, rows * SIDE))
        for i, tile in enumerate(self._tiles):
            sheet.paste(tile, (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
        return uri(sheet, QUALITY)


def square(listing: Listing, index: int, side: int) -> Image.Image:
    """The centre square of an image; grey where it cannot be read."""
    try:
        image = Image.open(io.BytesIO(listing.read(index))).convert("RGB")
    except OSError:
        return Image.new("RGB", (side, side), "grey")
    return ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)


def uri(image: Image.Image, quality: int) -> str:
    """A data: address of the image as JPEG."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def of_pixels(x: np.ndarray, side: int) -> Image.Image:
    """[S,S,3] of 0..255, any float type -> a picture of that side."""
    image = Image.fromarray(np.clip(np.rint(x), 0, 255).astype(np.uint8))
    return image.resize(
        (side, side), Image.Resampling.NEAREST if side > len(x) else Image.Resampling.BILINEAR
    )
