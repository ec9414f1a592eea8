"""What a run says once, before its first step, about data that may surprise the user."""

from collections.abc import Iterator

from fastdisco import data
from fastdisco.config import Config, Moco, Seed
from fastdisco.data.folder import told
from fastdisco.data.lines import printable


def remarks(cfg: Config, train: data.Listing, val: data.Listing | None) -> Iterator[str]:
    """A sentence for each: files that are passed over, and a queue that is larger than an epoch."""
    for listing in (train, val):
        if listing and listing.passed_over:
            yield f"{listing.source}: passed over: {printable(told(listing.passed_over))}"
    method = cfg.method
    images = len(train.kept) // cfg.data.batch * cfg.data.batch
    compared = isinstance(method, Seed) or (isinstance(method, Moco) and method.contrast > 0)
    if compared and images and method.queue > images:
        yield (
            f"method.queue: {method.queue} is more than the {images} images of an epoch, so images "
            f"are compared with their own older embeddings; a queue below {images} avoids it"
        )
