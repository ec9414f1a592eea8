"""Parts of a training set: SimCLR's published lists of 1 % and 10 % of ImageNet, parts drawn by
seed and class, and the images held out for a choice."""

from pathlib import Path

import numpy as np

from fastdisco.common.console import say, shorten
from fastdisco.common.errors import UserError
from fastdisco.data import Listing

# Names in imagenet_subsets/ of SimCLR's repository.
PUBLISHED = {"1percent.txt": 12811, "10percent.txt": 128116}


def published(path: Path, listing: Listing) -> np.ndarray:
    """Indices, ascending, of the images that a list file names: bare file names, one a line, no
    header.  Says so where a list of a published name has another count.

    Raises UserError where names are not in the listing, or stand for several images."""
    try:
        names = [line for line in path.read_text().splitlines() if line]
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({e}); give a text file of image names") from None
    want = PUBLISHED.get(path.name)
    if want is not None and len(names) != want:
        say(f"{path}: has {len(names)} names, the published list {want}")
    at: dict[str, int] = {}
    twice = set()
    for i, file in enumerate(listing.files):
        base = file.rpartition("/")[2]
        twice |= {base} & at.keys()
        at[base] = i
    if strange := [n for n in names if n not in at]:
        raise UserError(
            f"{path}: names {len(strange)} images that {listing.source} does not have: "
            f"{shorten(strange)}; the list is of bare file names without a header, and packed tars do "
            "not keep names: give class folders"
        )
    if doubtful := [n for n in names if n in twice]:
        raise UserError(
            f"{path}: names {shorten(doubtful)}, which {listing.source} has in several folders; "
            "such a list cannot say which is meant"
        )
    if len(set(names)) < len(names):
        raise UserError(f"{path}: names {len(names) - len(set(names))} images twice; remove them")
    kept = np.setdiff1d(np.array([at[n] for n in names], np.int64), listing.left_out)
    if len(kept) < len(names):
        say(f"{path}: {len(names) - len(kept)} of its images are left out by the quarantine")
    return kept


def drawn(
    labels: np.ndarray, indices: np.ndarray, share: float, seed: int, least: int = 1
) -> np.ndarray:
    """Indices, ascending: the same share of every class, drawn by the seed.

    labels   [N] of the whole listing
    indices  those to draw from
    share    0..1; round(share x images) in all, more where `least` of each class asks for it
    least    of every class that is there"""
    assert 0 < share <= 1
    own = labels[indices]
    classes, there = np.unique(own, return_counts=True)
    quota = share * there
    take = np.maximum(np.floor(quota).astype(np.int64), np.minimum(least, there))
    # What rounding down left over goes to the largest remainders; which of equal ones, the seed
    # says.
    left = round(share * len(own)) - take.sum()
    keys = _keys(seed, int(labels.size) + len(classes))
    order = np.lexsort((keys[labels.size :], -(quota - take)))
    order = order[take[order] < there[order]]
    take[order[: max(0, left)]] += 1
    # By an image's own key: a draw from more images or other classes leaves the rest alike.
    rank = np.lexsort((keys[indices], own))
    start = np.cumsum(there) - there
    chosen = [rank[s : s + t] for s, t in zip(start, take)]
    return np.sort(indices[np.concatenate(chosen)])


def held_out(
    labels: np.ndarray, indices: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(training images, images held out), each ascending; of classes with few images perhaps none
    is held out.

    Raises UserError where nothing would be held out."""
    held = drawn(labels, indices, share, seed, least=0)
    if not len(held):
        raise UserError(
            f"{share:.0%} of {len(indices)} training images is none to choose the learning rate "
            "on; hold out more, or give no grid"
        )
    return np.setdiff1d(indices, held), held


def _keys(seed: int, n: int) -> np.ndarray:
    """[n] uint64: raw words of Philox, a stream that NumPy does not change.  The second word of the
    key sets them apart from the order of an epoch."""
    return np.random.Philox(key=np.array([seed, 2**63], np.uint64)).random_raw(n)
