"""The order of the images in an epoch, by (seed, epoch).  N is the number of images."""

import numpy as np

from fastdisco.data import shards
from fastdisco.data.folder import Listing


def order(seed: int, epoch: int, listing: Listing) -> np.ndarray:
    """[N] int64, a permutation of all images by (seed, epoch)."""
    n = len(listing.files)
    if listing.places is None:
        return permutation(seed, epoch, n)
    return shards.order(_keys(seed, epoch, n + len(listing.places.tars) + 1), listing.places)


def images_of_step(listing: Listing, seed: int, batch: int, step: int) -> np.ndarray:
    """[batch] int64: the images of an optimizer step, from 0 on, over all ranks; before any that broke
    during the training have been replaced.

    batch  images of a step"""
    epoch, i = divmod(step, len(listing.kept) // batch)
    whole = order(seed, epoch, listing)
    return whole[~np.isin(whole, listing.left_out)][i * batch :][:batch]


def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    """[images] int64: the stable sort of random words."""
    return np.argsort(_keys(seed, epoch, images), kind="stable")


def _keys(seed: int, epoch: int, n: int) -> np.ndarray:
    """[n] uint64: the raw words of Philox4x64 with key (seed, epoch) and counter 0.

    Not Generator.permutation, whose stream NumPy may change."""
    return np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
