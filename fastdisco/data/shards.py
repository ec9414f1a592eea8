"""Data sets of tars (WebDataset): the listing, the order in which an epoch reads them, and what the
reader of DALI is given.  The index of a single tar is tar_index.py's.

N is the number of samples over all tars."""

import itertools
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from fastdisco.common.console import say, shorten
from fastdisco.common.errors import UserError
from fastdisco.data import lines, name_classes, tar_index
from fastdisco.data.folder import UNLABELLED, Listing, Places, classes_of

# BEGUN is for those who know tars by this module.
from fastdisco.data.manifest import BEGUN, MANIFEST, manifest_of  # noqa: F401
from fastdisco.data.remote import Store
from fastdisco.data.tar_index import Index, Row

# Samples that follow each other in a tar and stay together in an epoch: one read of about 1 MB
# instead of many small ones.
RUN = 8
OPEN = 512  # tars that one pipeline has open; a process may have 1024 files


# ---- the listing


def load(source: Path, root: Path, tars: list[str], store: Store | None = None) -> Listing:
    """The samples of root's tars, given by name: our own in the order of their stable indices,
    foreign ones as they come.

    store: where the tars come from, if from object storage; root is its root.
    Raises UserError for tars that are truncated, foreign, missing, given twice, or not those that
    their index or manifest was written for."""
    if twice := shorten(sorted(name for name, n in Counter(tars).items() if n > 1)):
        raise UserError(f"{source}: means {twice} twice; give a pattern that means each tar once")
    whole = source == (store.url if store else root)
    manifest = manifest_of(root, tars if whole else None)
    if store and manifest:
        store.knows({name: str(about["sha256"]) for name, about in manifest["tars"].items()})
    indices = _indices(root, tars, manifest is not None, store)
    if manifest is None and (root / MANIFEST).exists() and any(i.packed for i in indices):
        raise UserError(
            f"{root / MANIFEST}: is not the manifest of the tars there, or damaged; copy it again, "
            "or pack the data again"
        )
    numbers, names = [], []
    for name, its_index in zip(tars, indices):
        columns, members = _parsed(root / name, its_index, manifest, store)
        numbers.append(columns)
        names.append(members)
    index, label, offset, size = np.concatenate(numbers, axis=1)
    tar = np.repeat(np.arange(len(tars)), [len(members) for members in names])
    members = [member for some in names for member in some]

    n = len(members)
    if manifest is None:
        index = np.arange(n)
    order = np.argsort(index, kind="stable")
    if not np.array_equal(index[order], np.arange(n)):
        raise UserError(
            f"{source}: the indices of its {n} samples are not 0 to {n - 1}, so tars are missing or "
            "twice there; give the whole folder that was packed"
        )
    if manifest is None:
        labels, classes = _foreign_classes(source, label)
    else:
        labels, classes = label[order], manifest["classes"]
    files = [f"{tars[tar[i]]}/{members[i]}" for i in order.tolist()]
    places = Places(tars, tar[order], offset[order], size[order])
    return Listing(source, root, files, labels, classes, places, remote=store)


def _indices(root: Path, tars: list[str], stored: bool, store: Store | None) -> list[Index]:
    """Each tar's index, made where it is missing, of an older version, or of the tar as it was."""
    found = {name: tar_index.read(root / name) for name in tars}
    make, changed = [], []
    for name, index in found.items():
        if index is None:
            make.append(name)
        # A packed tar is compared with index and manifest by `_fits`: another one is an error.
        # One of object storage lies in a folder of this very content.
        elif not store and not index.packed and not tar_index.fits(root / name, index):
            make.append(name)
            if not index.old:
                changed.append(name)
    on_disk = True
    for name in track(make, f"indexing {root}", transient=True, disable=not make):
        if store:
            found[name], written = store.make_index(name, stored)
        else:
            found[name], written = tar_index.make(root / name, stored)
        on_disk &= written
    if changed:
        say(f"{root}: {shorten(changed)} is not as it was indexed, so it was indexed again")
    if not on_disk:
        say(f"{root}: cannot be written, so its tars are indexed at every start")
    return [index for name in tars if (index := found[name])]


def _parsed(
    tar: Path, index: Index, manifest: dict | None, store: Store | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Of a tar's index: index, label, offset and size [4,n] int64, and the members' names."""
    try:
        *columns, members = zip(*map(Row.parse, index.lines))
        numbers = np.array(columns, np.int64)
        size = store.size(tar.name) if store else tar.stat().st_size
        _fits(tar, size, index, numbers, manifest)
        # Bytes in object storage are compared when they are fetched.
        if not store:
            _same_headers(tar, index, numbers, members[-1])
        _same_pack(tar, index, manifest)
    except OSError as e:
        raise tar_index.unreadable(tar, e) from None
    except (ValueError, KeyError, TypeError, OverflowError):
        raise tar_index.damaged(tar) from None
    return numbers, members


def _fits(tar: Path, found: int, index: Index, numbers: np.ndarray, manifest: dict | None) -> None:
    """A quick look whether a tar can be the one that its index was written for; `data check`
    compares everything.

    found    bytes of the tar
    numbers  index, label, offset and size of the samples [4,n]
    Raises UserError for another size, other places, or another manifest."""
    wrong, wanted = _remedy(tar), index.about["bytes"]
    if found != wanted:
        raise UserError(f"{tar}: has {found} bytes, its index was written for {wanted}; {wrong}")
    _, _, offset, size = numbers
    # Every image follows a header block, and tars consist of whole blocks.
    aligned = (offset >= tarfile.BLOCKSIZE) & (offset % tarfile.BLOCKSIZE == 0)
    inside = (size >= 0) & (offset + size <= found)
    if not (aligned & inside).all():
        raise UserError(
            f"{tar_index.path_of(tar)}: does not fit its tar; remove it, it is written anew"
        )
    if manifest is None:
        return
    want = manifest["tars"].get(tar.name, {})
    if (found, len(size)) != (want.get("bytes"), want.get("samples")):
        raise UserError(
            f"{tar}: has {found} bytes and {len(size)} samples, not those of {MANIFEST}; {wrong}"
        )


def _same_headers(tar: Path, index: Index, numbers: np.ndarray, last: str) -> None:
    """Raises UserError where some headers in the tar are not those of its index; `last` is the name
    of the last member."""
    wrong = _remedy(tar)
    _, _, offset, size = numbers
    with tar.open("rb") as f:
        f.seek(offset[-1] - tarfile.BLOCKSIZE)
        head = f.read(tarfile.BLOCKSIZE)
    if size[-1] != tar_index.size_in(head) or not _names(head, last):
        raise UserError(f"{tar}: its image {last} is not where its index says; {wrong}")
    # Those of foreign tars have been compared already.
    compare = index.packed and not index.old
    if compare and tar_index.headers(tar, index.lines) != index.about["headers"]:
        raise UserError(f"{tar}: its headers are not those that its index was written for; {wrong}")


def _same_pack(tar: Path, index: Index, manifest: dict | None) -> None:
    """Raises UserError where the index of a packed tar is of another tar than the manifest names."""
    if manifest is None or not index.packed:
        return
    if index.about["sha256"] != manifest["tars"].get(tar.name, {}).get("sha256"):
        raise UserError(
            f"{tar}: its index is of another tar than {MANIFEST} names (SHA-256); copy the whole "
            "folder again"
        )


def _remedy(tar: Path) -> str:
    return f"copy the tar again, or remove {tar_index.path_of(tar)} if the tar is right"


def _names(head: bytes, member: str) -> bool:
    """Whether a header can be that member's.  It holds 100 bytes of the name: of a longer one its
    beginning or its end, and perhaps in ASCII."""
    name = head[:100].split(b"\0", 1)[0].decode(errors="ignore")
    forms = member, member.encode("ascii", "replace").decode()
    return bool(name) and any(f.startswith(name) or f.endswith(name) for f in forms)


def _foreign_classes(source: Path, label: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Labels and classes from the numbers in the tars; -1 is a sample without one."""
    unlabelled = int((label < 0).sum())
    if unlabelled == len(label):
        return np.zeros_like(label), [UNLABELLED]
    if unlabelled:
        raise UserError(
            f"{source}: {unlabelled} of its {len(label)} samples have no class (a member .cls); "
            "give all of them one, or none"
        )
    return classes_of([str(x) for x in label.tolist()])


# ---- the order in which an epoch reads them


def order(keys: np.ndarray, places: Places) -> np.ndarray:
    """[N] int64, a permutation of the samples by random `keys` [N + tars + 1] uint64: tar after
    tar, and in each tar its runs of RUN samples shuffled.

    So a batch comes from one tar or a few.  These are read in pieces of RUN samples, each byte
    once."""
    n, tars = len(places.tar), len(places.tars)
    rows = np.lexsort((places.offset, places.tar))  # the samples as they lie on disk
    tar = places.tar[rows]
    start = np.searchsorted(tar, np.arange(tars))  # row of each tar's first sample
    within = np.arange(n) - start[tar]  # position in its tar
    # Runs begin elsewhere in every epoch, so the neighbours of a sample change.
    run = (within + int(keys[-1] % RUN)) // RUN
    # One key for each tar, one for each run, and inside a run the order on disk.
    tar_key, run_key = keys[n + tar], keys[start[tar] + run]
    return rows[np.lexsort((within, run_key, tar_key))]


def reading_order(listing: Listing, indices: np.ndarray) -> np.ndarray:
    """The same images, sorted as they lie in the tars."""
    p = listing.places
    return indices[np.lexsort((p.offset[indices], p.tar[indices]))] if p else indices


def refuse_sorted(listing: Listing) -> None:
    """Raises UserError for tars whose samples are sorted by class: a batch would hold few classes.

    The share of pairs of one class, among neighbours and among all pairs within a tar, may exceed
    what chance gives by 0.1 and 6 standard errors.  Samples without classes are judged by their
    names; where these tell nothing and the tars' do, that is said."""
    if listing.places is None or len(listing.files) < 2:
        return
    rows = reading_order(listing, np.arange(len(listing.files)))
    label, tar = listing.labels, listing.places.tar[rows]
    remedy = f"fastdisco data pack {lines.for_shell(str(listing.source))} NEW_FOLDER"
    what = "sorted by class"
    if listing.classes == [UNLABELLED]:
        by_name = name_classes.of_members(_members(listing))
        if by_name is None:
            _doubt_tars(listing, remedy)
            return
        label, what = by_name, "sorted by class, to judge by their names"
    label = label[rows]
    n, classes = len(label), int(label.max()) + 1
    chance = _pairs(np.bincount(label)) / (n * (n - 1))
    neighbours = tar[1:] == tar[:-1]
    beside = (label[1:] == label[:-1])[neighbours].mean() if neighbours.any() else 0
    # Samples of each class in each tar, against samples in each tar.
    _, cells = np.unique(tar * classes + label, return_counts=True)
    within = _pairs(cells) / max(1, _pairs(np.bincount(tar)))
    allowed = chance + 0.1 + 6 * (chance * (1 - chance) / n) ** 0.5
    if max(beside, within) > allowed:
        raise UserError(
            f"{listing.source}: its samples are {what} ({beside:.0%} of neighbours and "
            f"{within:.0%} of pairs in a tar are of one class, {chance:.0%} in random order), so "
            f"batches would hold few classes; pack it in random order: {remedy}"
        )


def _members(listing: Listing) -> list[str]:
    """The members' names, without their tars'."""
    p = listing.places
    assert p is not None
    skip = [len(name) + 1 for name in p.tars]
    return [name[skip[k] :] for name, k in zip(listing.files, p.tar.tolist())]


def _doubt_tars(listing: Listing, remedy: str) -> None:
    """Says that tars with names of their own may hold a class each."""
    p = listing.places
    names = sorted({Path(name).stem for name in p.tars}) if p else []
    if len(names) > 1 and not name_classes.is_series(names):
        say(
            f"{listing.source}: its samples have no class (a member .cls) and its tars no numbers "
            f"that follow each other ({shorten(names)}); if each holds one class, so do most "
            f"batches, and the remedy is to pack it in random order: {remedy}"
        )


def _pairs(counts: np.ndarray) -> float:
    """Ordered pairs within groups of these sizes."""
    counts = counts.astype(float)
    return float((counts * (counts - 1)).sum())


# ---- what DALI's reader is given


def at_once(listing: Listing, indices: np.ndarray, batch: int) -> int:
    """How many of the indices, in whole batches, one pipeline reads: as many as OPEN tars hold, of
    object storage as many as the cache has at hand, but one batch at least."""
    if listing.places is None:
        return len(indices)
    ends = _changes(listing.places.tar[indices])
    most = listing.remote.span(_tars(listing, indices)) if listing.remote else OPEN
    return len(indices) if len(ends) < most else max(batch, int(ends[most - 1]) // batch * batch)


def hold(listing: Listing, indices: np.ndarray) -> Any:
    """Has the tars of these images there until release() of the result, a context manager; None
    where they are no tars of object storage."""
    return listing.remote.hold(_tars(listing, indices)) if listing.remote else None


def ahead(listing: Listing, indices: np.ndarray) -> None:
    """Tells which images are needed after those that are held, in this order."""
    if listing.remote:
        listing.remote.ahead(_tars(listing, indices))


def _tars(listing: Listing, indices: np.ndarray) -> list[str]:
    """The names of the tars that the images lie in, each as often as it begins."""
    places = listing.places
    if places is None or not len(indices):
        return []
    tar = places.tar[indices]
    return [places.tars[k] for k in tar[np.r_[0, _changes(tar)]].tolist()]


def lost(listing: Listing, indices: np.ndarray) -> dict[int, str]:
    """Those of the images, ascending and with the reason, whose tar is gone or ends before them."""
    places, bad = listing.places, {}
    if places is None:
        return bad
    for k in np.unique(places.tar[indices]).tolist():
        tar = listing.root / places.tars[k]
        size = tar.stat().st_size if tar.is_file() else -1
        why = f"{tar.name} is gone" if size < 0 else f"{tar.name} is cut short"
        here = np.unique(indices[places.tar[indices] == k])
        bad |= dict.fromkeys(here[places.offset[here] + places.size[here] > size].tolist(), why)
    return dict(sorted(bad.items()))


def reader(places: Places, root: Path, indices: np.ndarray, folder: str) -> dict[str, list[str]]:
    """Arguments of fn.readers.webdataset that make it read these samples in this order.

    It reads a tar in the order of an index file, in DALI's format 1.1: a version and the number of
    samples, then for each sample extension, offset and size.  We write into `folder` a file of our
    own for each piece of the order that lies in one tar; DALI reads them while the pipeline is
    built."""
    offset, size, tar = places.offset[indices], places.size[indices], places.tar[indices]
    lines = [f"img {o} {s}\n" for o, s in zip(offset.tolist(), size.tolist())]
    cuts = [0, *_changes(tar).tolist(), len(tar)]
    paths, index_paths = [], []
    for k, (begin, end) in enumerate(itertools.pairwise(cuts)):
        paths.append(str(root / places.tars[tar[begin]]))
        index_paths.append(f"{folder}/{k}")
        with open(index_paths[-1], "w") as f:
            f.write(f"v1.1 {end - begin}\n")
            f.writelines(lines[begin:end])
    return dict(paths=paths, index_paths=index_paths)


def _changes(x: np.ndarray) -> np.ndarray:
    """Positions whose element differs from the one before."""
    return np.flatnonzero(np.diff(x)) + 1
