"""All ranks of a run agree: they were given the same, they see the same folder, and when one of them
refuses, all end with its exit code."""

import contextlib
import hashlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as td

from fastdisco import config
from fastdisco.common import attempt, dist, files
from fastdisco.common.console import refuse
from fastdisco.common.errors import UserError
from fastdisco.config import Config
from fastdisco.data import Listing
from fastdisco.models import newest_first
from fastdisco.run import lock
from fastdisco.run.environment import versions

# Keys that may differ between ranks: where files lie on a machine, whose contents are compared
# instead, and what its cores allow.
_LOCAL = (
    "run.out",
    "data.train",
    "data.val",
    "data.quarantine",
    "data.threads",
    "data.prefetch",
    "teacher.file",
    "teacher.cache_folder",
)
# Seconds for what another host wrote to show through a network file system's caches.
SHOWS = 60.0
# Keys of the ranks' store: a refusal's text, and how many ranks have ended after it.
_REFUSED, _ENDED = "fastdisco/refused", "fastdisco/ended"
# Seconds between two looks for a refusal; in which ranks find the same error; and to end together.
_LOOK, _SAME, _WAIT = 0.5, 2.0, 10.0


def same_settings(cfg: Config, overwrite: bool = False) -> None:
    """Raises the same UserError on every rank unless command and versions are equal."""
    same(settings(cfg) | {"--overwrite": str(overwrite)})


def settings(cfg: Config | None) -> dict[str, str]:
    """What all ranks must have in common before any data are read: versions, and the keys of the
    configuration but those that may differ between machines."""
    keys = config.flatten(cfg.model_dump(mode="json")) if cfg else {}
    facts = {k: str(v) for k, v in keys.items() if k not in _LOCAL}
    return facts | {f"version of {k}": v for k, v in versions().items()}


def same(facts: dict[str, str]) -> None:
    """Raises the same UserError on every rank unless all have the same facts.

    It names the first rank that has another value than rank 0, the key and both values."""
    texts = dist.all_texts(json.dumps({"host": platform.node(), "facts": facts}))
    first, *others = (json.loads(x) for x in texts)
    for rank, other in enumerate(others, 1):
        for key in sorted(first["facts"] | other["facts"]):
            here, there = first["facts"].get(key), other["facts"].get(key)
            if here != there:
                raise UserError(
                    f"{key}: rank {rank} on {other['host']} has {there}, rank 0 on {first['host']} "
                    f"has {here}; give all ranks the same"
                )


def same_files(train: Listing, val: Listing | None, teacher: str) -> None:
    """Raises the same UserError on every rank unless all have the same images and the same teacher,
    whose fingerprint is `teacher`."""
    found = {"data.train": train, "data.val": val}
    facts = {key: _images(listing) if listing else "none" for key, listing in found.items()}
    same(facts | {"the teacher's fingerprint": teacher})


def same_folder(folder: Path, mark: str) -> None:
    """Raises the same UserError on every rank unless all see the folder whose lock has the id
    `mark`, which rank 0 knows."""
    said = dist.all_texts(f"{mark} {platform.node()}")
    mark, _, host = said[0].partition(" ")
    sees = _shows(lambda: lock.read(folder / lock.NAME).get("id") == mark, host)
    for rank, text in enumerate(dist.all_texts(f"{sees:d} {platform.node()} {folder.absolute()}")):
        seen, there, path = text.split(" ", 2)
        if seen != "1":
            raise UserError(
                f"run.out: rank {rank} on {there} does not see the folder of rank 0 on {host} as "
                f"{path}; give a folder that all nodes share"
            )


def same_checkpoint(folder: Path) -> None:
    """Raises the same UserError on every rank unless all see the same checkpoints of the run in the
    folder, whose path may differ."""
    host, _, names = dist.all_texts(f"{platform.node()} {_checkpoints(folder)}")[0].partition(" ")
    _shows(lambda: _checkpoints(folder) == names, host)
    same({"checkpoints/last": _checkpoints(folder)})


@contextlib.contextmanager
def together() -> Iterator[list[Callable[[], Any]]]:
    """Where one rank raises a UserError in this context, all ranks end with code 2, and one of them
    says why.  Called by every rank once they are joined; needed by several ranks only.

    Yields an empty list.  A rank that ends because of another one does not leave its own contexts:
    it calls what has been added to the list, the latest first."""
    closing: list[Callable[[], Any]] = []
    if dist.world() == 1:
        yield closing
        return
    # A connection of this thread's own: what waits on the other one would block it.
    store = td.distributed_c10d._get_default_store()
    ended, leaving = threading.Event(), threading.Event()
    watched = (store.clone(), ended, leaving, closing)
    watch = threading.Thread(target=_watch, args=watched, daemon=True)
    watch.start()
    try:
        with files.refused():
            yield closing
    except UserError as e:
        ended.set()
        # Before the others end: then a launcher may kill this rank.
        attempt.ended(2)
        _say(store, e)
        _end_together(store)
        sys.exit(2)
    except Exception:
        # A connection to a rank that is ending has broken: the watch ends this one, with its code.
        if leaving.is_set():
            watch.join()
        raise
    finally:
        ended.set()
    watch.join()
    # Rank 0 takes the store with it.
    dist.barrier()


def _say(store: td.Store, error: UserError) -> None:
    """Tells the other ranks of the error, and prints it unless rank 0 does."""
    rank = str(dist.rank())
    # The first to come here.
    first = store.compare_set(_REFUSED, "", rank).decode()
    if error.anywhere or rank == "0":
        refuse(error)
        store.set(f"{_REFUSED}/{rank}", "said")
    elif first == rank:
        # All ranks may find the same error: then rank 0 says it.
        with contextlib.suppress(td.DistError):
            store.wait([f"{_REFUSED}/0"], timedelta(seconds=_SAME))
        if not store.check([f"{_REFUSED}/0"]):
            refuse(UserError(f"rank {rank} on {platform.node()}: {error}", anywhere=True))


def _end_together(store: td.Store) -> None:
    """Waits until all ranks are about to end.

    The first one to end would take the store with it, or leave the others with broken connections,
    of which they would print tracebacks; and a launcher would kill them."""
    end = time.monotonic() + _WAIT
    # All is said.  When rank 0 is gone, PyTorch would print its stack for every look at the store.
    sys.stderr.flush()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    # Errors: rank 0 has waited for long enough.
    with contextlib.suppress(RuntimeError):
        store.add(_ENDED, 1)
        while store.add(_ENDED, 0) < dist.world() and time.monotonic() < end:
            time.sleep(0.1)


def _watch(
    store: td.Store,
    ended: threading.Event,
    leaving: threading.Event,
    closing: list[Callable[[], Any]],
) -> None:
    """Ends this process when another rank has refused: it may wait for that rank for ever.

    leaving  is set when this is decided."""
    while not ended.wait(_LOOK):
        try:
            refused = store.check([_REFUSED])
        except RuntimeError:
            # Rank 0 has crashed.
            return
        # This rank may be about to say the same error.
        if refused and not ended.wait(_SAME + 1):
            leaving.set()
            # Before the others end: then a launcher may kill this rank.
            for close in reversed(closing):
                with contextlib.suppress(Exception):
                    close()
            _end_together(store)
            sys.stdout.flush()
            os._exit(2)


def _shows(seen: Callable[[], bool], host: str) -> bool:
    """Whether this rank sees what rank 0 on `host` has written; waits SHOWS seconds for it where the
    hosts differ."""
    end = time.monotonic() + (0 if platform.node() == host else SHOWS)
    while not (found := seen()) and time.monotonic() < end:
        time.sleep(0.5)
    return found


def _images(listing: Listing) -> str:
    """Says which images these are: equal numbers of other images have another fingerprint, and so
    have equal numbers that the quarantine leaves out."""
    said = f"{len(listing.files):,} images with the fingerprint {listing.fingerprint[:12]}"
    if not len(listing.left_out):
        return said
    # Each node may have a list of its own, and the order of the images follows from it.
    left = hashlib.sha256(listing.left_out.astype("<i8").tobytes()).hexdigest()[:12]
    return f"{said}, {len(listing.left_out):,} left out by the quarantine (fingerprint {left})"


def _checkpoints(folder: Path) -> str:
    """The names of the checkpoints that the run may continue from, the newest first."""
    return ", ".join(step.name for step in newest_first(folder)[0]) or "none"
