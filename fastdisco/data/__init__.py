"""Images into batches of views: listings, and loaders on DALI."""

from fastdisco.data.folder import Listing
from fastdisco.data.loader import Batch, EvalLoader, TrainLoader
from fastdisco.data.placement import place
from fastdisco.data.shards import reading_order
from fastdisco.data.source import listing, same_classes

__all__ = [
    "Batch",
    "EvalLoader",
    "Listing",
    "TrainLoader",
    "listing",
    "place",
    "reading_order",
    "same_classes",
]
