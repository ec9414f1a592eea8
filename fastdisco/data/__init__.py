"""Images into batches of views: listings, and loaders on DALI."""
from fastdisco.data.folder import Listing, listing
from fastdisco.data.loader import Batch, EvalLoader, TrainLoader

__all__ = ["Batch", "EvalLoader", "Listing", "TrainLoader", "listing"]
