"""Data sets of tars in object storage: what is there, and their tars by way of a cache on local
disk (docs/storage.md).

To the rest of this package such a data set is a folder, the `root`, with indices, manifest and
quarantine, and links to the tars in the cache.  A tar is there while somebody holds it."""

import hashlib
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastdisco import config
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.common.files import naming, refused, write_whole
from fastdisco.common.urls import Url
from fastdisco.data import objects, tar_index
from fastdisco.data.cache import Cache, Hold, Wanted, locked
from fastdisco.data.manifest import BEGUN, MANIFEST
from fastdisco.data.objects import Object

# One pipeline has at most so many tars, each with a lock, open, and so much of the cache in use.
# With the pipelines of other ranks and what is fetched ahead, half of the cache is enough.
TARS, SHARE = 128, 0.25
AHEAD = 0.5  # share of the cache that is fetched ahead
SMALL = 16  # small objects that are read at once


def folder_of(images: config.Data | None) -> Path:
    """Where the cache lies, as an absolute path: data.cache, else where FASTDISCO_CACHE says, else in
    the home."""
    given = images.cache if images is not None else None
    # Links to the tars must hold wherever they are read from.
    return (
        Path(given or os.environ.get("FASTDISCO_CACHE") or "~/.cache/fastdisco")
        .expanduser()
        .absolute()
    )


class Store:
    """A folder of tars in object storage."""

    def __init__(self, url: Url, images: config.Data | None, extra: str | None = None) -> None:
        """Lists the folder; no tar is read.

        images  says where the cache is, and its size
        extra   the name of one more small object that is wanted where it is there
        Raises UserError."""
        self.url = url
        self.found = objects.listed(url)
        self.tars = [n for n in self.found if n.endswith(".tar") and not n.startswith(".")]
        if not self.tars and MANIFEST not in self.found and BEGUN not in self.found:
            raise _no_tars(url, self.found)
        gb = (images or config.Data.model_construct()).cache_gb
        where = folder_of(images)
        self.cache = Cache(where / "objects", int(gb * 1e9))
        # Another content of the folder has another root, so nothing there is ever of other tars.
        about = "\n".join(f"{n} {o.size} {o.etag}" for n, o in self.found.items())
        self.root = (where / "sets" / _id(_server(), str(url), about)).resolve()
        self._sha256: dict[str, str] = {}
        with naming(where), refused():
            self._prepare([MANIFEST, BEGUN, extra])
        self._ahead = _Ahead(self.cache)

    # ---- the root

    def _prepare(self, small: list[str | None]) -> None:
        """Fills the root.  One process of a node does it, the others wait."""
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root / ".lock"):
            indices = [tar_index.path_of(Path(tar)).name for tar in self.tars]
            names = [n for n in [*small, *indices] if n in self.found]
            lacking = [n for n in names if not (self.root / n).exists()]
            with ThreadPoolExecutor(SMALL) as pool:
                list(pool.map(self._small, lacking))
            for tar in self.tars:
                if not (link := self.root / tar).is_symlink():
                    link.symlink_to(self.cache.path(self.wanted(tar)))

    def _small(self, name: str) -> None:
        content = objects.read(self.found[name])
        text = content.decode(errors="surrogateescape")
        if name.endswith(".index") and not _is_packed(text):
            # It was made of a local file, whose time it knows; nobody can compare that.
            return
        write_whole(self.root / name, text)

    def make_index(self, tar: str, stored: bool) -> tuple[tar_index.Index, bool]:
        """As tar_index.make; the tar is fetched for it, once for this content of it."""
        suffix = ".stored.index" if stored else ".index"
        kept, here = self.cache.path(self.wanted(tar)).with_suffix(suffix), self.root / tar
        if not kept.exists():
            with self.hold([tar]):
                made = tar_index.make(here, stored)
            write_whole(kept, tar_index.index_text(made[0].about, _rows(made[0])))
            return made
        text = kept.read_text(errors="surrogateescape")
        try:
            found = tar_index.parse(text)
        except (ValueError, RecursionError):
            # Damaged since; it is made anew.
            kept.unlink()
            return self.make_index(tar, stored)
        write_whole(tar_index.path_of(here), text)
        return found, True

    def knows(self, sha256: dict[str, str]) -> None:
        """Gives the SHA-256 of tars, which is compared when they are fetched."""
        self._sha256 |= sha256

    # ---- tars

    def size(self, tar: str) -> int:
        """Bytes of a tar."""
        return self.found[tar].size

    def wanted(self, tar: str) -> Wanted:
        """A tar as the cache takes it."""
        about = self.found[tar]
        content = _id(_server(), str(about.url), about.etag, str(about.size))
        fetch = lambda to: objects.download(about, to, self._sha256.get(tar))
        return Wanted(content, str(about.url), about.size, fetch)

    def hold(self, tars: list[str]) -> Hold:
        """Has the tars in the root until the hold is released.  Raises UserError."""
        return self.cache.hold([self.wanted(tar) for tar in dict.fromkeys(tars)])

    def span(self, tars: list[str]) -> int:
        """How many of the tars, which are read in this order, one pipeline takes: those that are
        there, so that the first batch need not wait for others; two at least."""
        room = self.cache.limit * SHARE
        for n, tar in enumerate(tars):
            room -= self.size(tar)
            if n >= 2 and (n >= TARS or room < 0 or not self.cache.has(self.wanted(tar))):
                return n
        return len(tars)

    def ahead(self, tars: list[str]) -> None:
        """Has a thread fetch the first of these tars, in this order, in place of what it was given
        before."""
        room, some = self.cache.limit * AHEAD, []
        for tar in dict.fromkeys(tars):
            room -= self.size(tar)
            if room < 0:
                break
            some.append(self.wanted(tar))
        self._ahead.give(some)

    def say_cached(self, tars: list[str]) -> None:
        """Says how much of the tars is in the cache."""
        there = [tar for tar in tars if self.cache.has(self.wanted(tar))]
        gb = lambda some: sum(map(self.size, some)) / 1e9
        say(
            f"{self.url}: {len(there)} of {len(tars)} tars ({gb(there):.3g} of {gb(tars):.3g} GB) "
            f"are in {self.cache.folder.parent}, which holds at most {self.cache.limit / 1e9:.3g} GB "
            "(data.cache_gb)"
        )

    def named(self, error: UserError) -> UserError:
        """The error with the address in place of the root."""
        return UserError(str(error).replace(str(self.root), str(self.url)), error.anywhere)


class _Ahead:
    """A thread that fetches objects into the cache in the order that it is given."""

    def __init__(self, cache: Cache) -> None:
        self._cache, self._queue = cache, deque[Wanted]()
        self._given = threading.Condition()
        self._thread: threading.Thread | None = None

    def give(self, wanted: list[Wanted]) -> None:
        with self._given:
            self._queue = deque(wanted)
            self._given.notify()
            if self._thread is None and wanted:
                # It ends with the process, in the midst of a piece if need be.
                self._thread = threading.Thread(target=self._run, daemon=True, name="ahead")
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._given:
                while not self._queue:
                    self._given.wait()
                wanted = self._queue.popleft()
            try:
                # Where another process has it in work, this one takes the next.
                self._cache.fetch_ahead(wanted)
            except UserError:
                # Nobody needs it yet.  Whoever does tries again, and tells.
                continue


def _rows(index: tar_index.Index) -> list[tar_index.Row]:
    return [tar_index.Row.parse(line) for line in index.lines]


def _is_packed(text: str) -> bool:
    try:
        return tar_index.parse(text).packed
    # Something else's: the tar tells.
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


def _no_tars(url: Url, found: dict[str, Object]) -> UserError:
    what = "there is nothing" if not found and not objects.folders(url) else "no tars are there"
    return UserError(
        f"{url}: {what}; object storage holds data sets as tars, which `fastdisco data pack FOLDER "
        f"{url}` writes"
    )


def _server() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _id(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]
