"""Tars of samples (WebDataset): their index, the order in which an epoch reads them, and the
reader's index files.

A sample is the members of one stem that follow each other: an image, its class as a number in
`cls`, and in our own tars its stable index in
`idx`.  Beside a tar x.tar lies x.index, which `fastdisco data pack` writes, or the first use of a
foreign tar: a line of JSON about the tar, then for each sample its index, label (-1: none), offset
and size of the image, and the member's name, between tabs."""

import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from fastdisco.common.console import say, shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.data.folder import EXTENSIONS, Listing, Places, classes_of

MANIFEST = "manifest.json"  # of a set that `fastdisco data pack` wrote
BEGUN = "manifest.part.json"  # of one that it has not finished
# Samples that follow each other in a tar and stay together in an epoch: one read of about 1 MB
# instead of many small ones.
RUN = 8
OPEN = 512  # tars that one pipeline has open; a process may have 1024 files


class Row(NamedTuple):
    """A sample, as a line of an index tells it."""

    index: int  # in a foreign tar the position there
    label: int  # -1: none
    offset: int  # of the image, as its size: bytes
    size: int
    name: str  # of the image's member

    def line(self) -> str:
        return "\t".join(map(str, self))

    @classmethod
    def parse(cls, line: str) -> "Row":
        """Raises ValueError for what is no such line."""
        index, label, offset, size, name = line.split("\t", 4)
        return cls(int(index), int(label), int(offset), int(size), name)


def load(source: Path, root: Path, tars: list[str]) -> Listing:
    """The samples of root's tars: our own in the order of their stable indices, foreign ones as
    they come.

    Raises UserError for tars that are truncated, foreign, missing, or not those that their index or
    manifest was written for."""
    manifest = manifest_of(root, tars if source == root else None)
    texts, kept = [], True
    for name in track(
        tars,
        f"indexing {root}",
        transient=True,
        disable=all(_index_of(root / t).exists() for t in tars),
    ):
        text, written = _index(root / name, manifest is not None)
        kept &= written
        texts.append(text)
    if not kept:
        say(f"{root}: cannot be written, so its tars are indexed at every start")
    numbers, names, tar = [], [], []
    for k, (name, text) in enumerate(zip(tars, texts)):
        # Not splitlines, which splits at more than that.
        head, *lines = text.removesuffix("\n").split("\n")
        try:
            *columns, members = zip(*map(Row.parse, lines))
            numbers.append(np.array(columns, np.int64))
            _fits(root / name, json.loads(head)["bytes"], numbers[-1], members[-1], manifest)
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{_index_of(root / name)}: is not an index that fastdisco wrote, or damaged; "
                "remove it, it is written anew"
            ) from None
        names += members
        tar.append(np.full(len(members), k))
    index, label, offset, size = np.concatenate(numbers, axis=1)
    tar = np.concatenate(tar)
    if manifest is None:
        index = np.arange(len(names))
    at = np.argsort(index, kind="stable")
    if not np.array_equal(index[at], np.arange(len(names))):
        raise UserError(
            f"{source}: the indices of its {len(names)} samples are not 0 to {len(names) - 1}, so "
            "tars are missing or twice there; give the whole folder that was packed"
        )
    if manifest is None:
        labels, classes = _foreign_classes(source, label)
    else:
        labels, classes = label[at], manifest["classes"]
    files = [f"{tars[tar[i]]}/{names[i]}" for i in at.tolist()]
    return Listing(
        source, root, files, labels, classes, Places(tars, tar[at], offset[at], size[at])
    )


def order(keys: np.ndarray, places: Places) -> np.ndarray:
    """[N] int64, a permutation of the samples by random `keys` [N + tars + 1] uint64: tar after
    tar, a tar's runs of RUN samples shuffled.

    So a batch comes from one tar or a few, which are read in pieces of RUN samples, and each byte
    once."""
    n, tars = len(places.tar), len(places.tars)
    rows = np.lexsort((places.offset, places.tar))
    tar = places.tar[rows]
    start = np.searchsorted(tar, np.arange(tars))
    within = np.arange(n) - start[tar]
    run = (within + int(keys[-1] % RUN)) // RUN  # runs begin elsewhere in every epoch
    return rows[np.lexsort((within, keys[start[tar] + run], keys[n + tar]))]


def reading_order(listing: Listing, indices: np.ndarray) -> np.ndarray:
    """The same images as they lie in the tars."""
    p = listing.places
    return indices[np.lexsort((p.offset[indices], p.tar[indices]))] if p else indices


def at_once(listing: Listing, indices: np.ndarray, batch: int) -> int:
    """How many of the indices, in whole batches, one pipeline reads: as many as OPEN tars hold, but
    one batch at least."""
    if listing.places is None:
        return len(indices)
    ends = np.flatnonzero(np.diff(listing.places.tar[indices])) + 1
    return len(indices) if len(ends) < OPEN else max(batch, int(ends[OPEN - 1]) // batch * batch)


def reader(listing: Listing, indices: np.ndarray, folder: str) -> dict:
    """Arguments of readers.webdataset that make it read these samples in this order, by index files
    written into `folder`."""
    p = listing.places
    tar, lines = (
        p.tar[indices],
        [f"img {o} {s}\n" for o, s in zip(p.offset[indices].tolist(), p.size[indices].tolist())],
    )
    cuts = [0, *(np.flatnonzero(np.diff(tar)) + 1).tolist(), len(tar)]
    paths, index_paths = [], []
    for k, (a, b) in enumerate(zip(cuts, cuts[1:])):
        paths.append(str(listing.root / p.tars[tar[a]]))
        index_paths.append(f"{folder}/{k}")
        with open(index_paths[-1], "w") as f:
            f.write(f"v1.1 {b - a}\n")
            f.writelines(lines[a:b])
    return dict(paths=paths, index_paths=index_paths)


def refuse_sorted(listing: Listing):
    """Raises UserError where samples of a class lie together: in neighbours, or in the same tars,
    so that a batch would hold few classes."""
    if listing.places is None:
        return
    rows = reading_order(listing, np.arange(len(listing.files)))
    label, tar = listing.labels[rows], listing.places.tar[rows]
    n = len(label)
    count = np.bincount(label).astype(float)
    if n < 2:
        return
    chance = (count * (count - 1)).sum() / (n * (n - 1))  # that two samples are of one class
    pairs = tar[1:] == tar[:-1]
    beside = (label[1:] == label[:-1])[pairs].mean() if pairs.any() else 0
    cells = np.unique(tar * len(count) + label, return_counts=True)[1].astype(float)
    sizes = np.bincount(tar).astype(float)
    within = (cells * (cells - 1)).sum() / max(1, (sizes * (sizes - 1)).sum())
    allowed = chance + 0.1 + 6 * (chance * (1 - chance) / n) ** 0.5
    if max(beside, within) > allowed:
        raise UserError(
            f"{listing.source}: its samples are sorted by class ({beside:.0%} of neighbours and "
            f"{within:.0%} of pairs in a tar are of one class, {chance:.0%} in random order), so "
            "batches would hold few classes; pack it in random order: fastdisco data pack "
            f"{listing.source} NEW_FOLDER"
        )


def scan(tar: Path, stored: bool) -> list[Row]:
    """The rows of a tar's index.  stored: its samples bear a stable index, else theirs is the
    position in the tar.

    Raises UserError for what is no tar of samples."""
    rows, stem, parts = [], None, {}

    def close():
        if stem is not None:
            rows.append(_row(tar, stem, parts, stored, len(rows)))

    for name, offset, size, content in _members(tar):
        _, _, ext = name.rpartition("/")[2].partition(".")
        key = name[: len(name) - len(ext)]
        if key != stem:
            close()
            stem, parts = key, {}
        parts.setdefault(ext.lower(), (name, offset, size, content))
    close()
    if not rows:
        raise UserError(f"{tar}: an empty tar; remove it")
    return rows


def header(bytes_: int, sha256: str | None) -> dict:
    """What an index says of its tar; sha256 is known of those that were packed here."""
    return {"fastdisco index": 1, "bytes": bytes_, "sha256": sha256}


def index_text(about: dict, rows: list[Row]) -> str:
    """What an index file holds."""
    return "\n".join([json.dumps(about), *(row.line() for row in rows)]) + "\n"


def about(tar: Path) -> dict:
    """The first line of a tar's index."""
    with _index_of(tar).open() as f:
        return json.loads(f.readline())


def rows_of(tar: Path) -> list[Row]:
    """Of its index."""
    return [
        Row.parse(line)
        for line in _index_of(tar)
        .read_text(errors="surrogateescape")
        .removesuffix("\n")
        .split("\n")[1:]
    ]


def _index_of(tar: Path) -> Path:
    return tar.with_suffix(".index")


def _index(tar: Path, stored: bool) -> tuple[str, bool]:
    """Text of the tar's index, made where there is none, and whether it is on disk."""
    path = _index_of(tar)
    try:
        return path.read_text(errors="surrogateescape"), True
    except FileNotFoundError:
        pass
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); allow reading it") from None
    text = index_text(header(tar.stat().st_size, None), scan(tar, stored))
    try:
        write_whole(path, text)
    except OSError:
        return text, False
    return text, True


def _fits(tar: Path, bytes_: int, numbers: np.ndarray, last: str, manifest: dict | None):
    """Raises UserError where the size of the tar, its samples' number and places or its last
    image's header are not what the index says.

    numbers: index, label, offset and size of the samples [4,n]; last: the last member's name.
    `data check` compares them all."""
    wrong = f"copy the tar again, or remove {_index_of(tar)} if the tar is right"
    found = tar.stat().st_size
    if found != bytes_:
        raise UserError(f"{tar}: has {found} bytes, its index was written for {bytes_}; {wrong}")
    _, _, offset, size = numbers
    if (
        (offset < tarfile.BLOCKSIZE).any()
        or (size < 0).any()
        or (offset + size).max() > found
        or (offset % tarfile.BLOCKSIZE).any()
    ):
        raise UserError(f"{_index_of(tar)}: does not fit its tar; remove it, it is written anew")
    with tar.open("rb") as f:
        f.seek(offset[-1] - tarfile.BLOCKSIZE)
        head = f.read(tarfile.BLOCKSIZE)
    # Of a long one its beginning or its end, and perhaps in ASCII.
    name = head[:100].split(b"\0", 1)[0].decode(errors="ignore")
    forms = last, last.encode("ascii", "replace").decode()
    if size[-1] != _size(head) or not (
        name and any(f.startswith(name) or f.endswith(name) for f in forms)
    ):
        raise UserError(f"{tar}: its image {last} is not where its index says; {wrong}")
    want = manifest["tars"].get(tar.name, {}) if manifest else {}
    if manifest and (found, len(size)) != (want.get("bytes"), want.get("samples")):
        raise UserError(
            f"{tar}: has {found} bytes and {len(size)} samples, not those of {MANIFEST}; {wrong}"
        )


def _size(head: bytes) -> int | None:
    try:
        return tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape").size
    except tarfile.TarError:
        return None


def manifest_of(root: Path, tars: list[str] | None) -> dict | None:
    """The manifest of a packed folder, None of a foreign one; `tars`, where given, must be all of
    its tars."""
    if (root / BEGUN).exists():
        raise UserError(
            f"{root}: packing it was not finished; give the same `fastdisco data pack` command "
            "again"
        )
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"{root / MANIFEST}: cannot be read ({e}); pack the data again") from None
    if not (isinstance(manifest, dict) and manifest.keys() >= {"shard_bytes", "classes", "tars"}):
        return None  # another tool's
    if tars is not None and set(tars) != set(manifest["tars"]):
        missing, strange = (
            sorted(a - b)
            for a, b in ((set(manifest["tars"]), set(tars)), (set(tars), set(manifest["tars"])))
        )
        raise UserError(
            f"{root}: "
            + (
                f"{shorten(missing)} of {MANIFEST} is missing; copy the whole folder again"
                if missing
                else f"{shorten(strange)} is not in {MANIFEST}; move it out of the folder"
            )
        )
    return manifest


def _foreign_classes(source: Path, label: np.ndarray) -> tuple[np.ndarray, list[str]]:
    if (label < 0).all():
        return np.zeros_like(label), ["unlabelled"]
    if (label < 0).any():
        raise UserError(
            f"{source}: {(label < 0).sum()} of its {len(label)} samples have no class (a member "
            ".cls); give all of them one, or none"
        )
    return classes_of([str(x) for x in label.tolist()])


def _row(tar: Path, stem: str, parts: dict, stored: bool, position: int) -> Row:
    images = [ext for ext in parts if ext in EXTENSIONS]
    if len(images) != 1:
        found = " and ".join(images) if images else "none"
        raise UserError(
            f"{tar}: its sample {stem}* needs one image, found {found} (members: "
            f"{shorten(list(parts))}; images are {' '.join(EXTENSIONS)}); is this a WebDataset tar?"
        )
    name, offset, size, _ = parts[images[0]]
    if "\n" in name or "\r" in name:
        raise UserError(f"{tar}: the member {name!r} has a line break in its name; rename it")
    label = _number(tar, parts["cls"]) if "cls" in parts else -1
    if stored and "idx" not in parts:
        raise UserError(
            f"{tar}: its sample {stem}* has no index (a member .idx), so {MANIFEST} there is not "
            "of this tar; pack the data again"
        )
    return Row(_number(tar, parts["idx"]) if stored else position, label, offset, size, name)


def _number(tar: Path, part: tuple) -> int:
    name, _, _, content = part
    if not content.isdigit() or len(content) > 12:
        raise UserError(
            f"{tar}: its member {name} holds {content[:20]!r} instead of a whole number; is this a "
            "WebDataset tar?"
        )
    return int(content)


def _members(tar: Path):
    """(name, offset, size, content or None) of the regular files in a tar; the content of small
    ones."""
    again = "copy it again, or remove it"
    try:
        with tarfile.open(tar, "r:") as t:
            for m in t:
                if m.issparse():
                    raise UserError(
                        f"{tar}: its member {m.name} is sparse; write the tar without --sparse"
                    )
                if m.isreg():
                    small = m.name.endswith((".cls", ".idx")) and m.size <= 64
                    yield (
                        m.name,
                        m.offset_data,
                        m.size,
                        t.extractfile(m).read().strip() if small else None,
                    )
            t.fileobj.seek(t.offset)
            end = t.fileobj.read(tarfile.BLOCKSIZE)
            if not end:  # cut between two members
                raise tarfile.ReadError("no end mark")
            if end.strip(b"\0"):
                raise UserError(
                    f"{tar}: damaged, there is no member's header at byte {t.offset}; {again}"
                )
    except (tarfile.TarError, ValueError, EOFError) as e:
        with tar.open("rb") as f:
            packed = f.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")
        why, how = (
            ("compressed", "unpack it once, as DALI reads plain tars only")
            if packed
            else (f"truncated or no tar ({e})", again)
        )
        raise UserError(f"{tar}: {why}; {how}") from None
    except OSError as e:
        raise UserError(f"{tar}: cannot be read ({e.strerror or e}); {again}") from None
