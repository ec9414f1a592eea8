"""Writing a checkpoint's files, by all ranks: everything under another name first, then the manifest,
the step's own name, and `last`.  A crash at any moment leaves the last checkpoint whole.

The ranks speak with each other by `texts` alone: collectives where the training waits for the save,
the ranks' store where a thread saves beside it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.common.files import naming, sync, told, write_whole
from fastdisco.models import checkpoints, manifest
from fastdisco.models.weights import as_safetensors

# A rank's text -> every rank's, in rank order.
Texts = Callable[[str], list[str]]
# Free bytes beyond what the tensors need: for names, pickles and the manifest.
_SPARE = 1 << 20


class NotSaved(UserError):
    """A checkpoint could not be written; the one before is whole.  Raised on every rank alike."""


def write(
    run: Path,
    step: int,
    shared: dict[str, Any],
    own: dict[str, Any],
    keep: int,
    texts: Texts = dist.all_texts,
    allowed: Callable[[], None] = lambda: None,
) -> None:
    """Writes step_<step>, points `last` to it and removes all but the `keep` newest; called by every
    rank.

    shared   what rank 0 writes for all, and needs alone;  own: what each rank writes for itself
    texts    as dist.all_texts, by which the ranks agree
    allowed  raises an error where the rank may not write, or no longer: asked at the start, and by
             rank 0 before the checkpoint gets its name
    Raises NotSaved where a rank meets an error of the file system."""
    folder = run / "checkpoints" / f"step_{step:08}"
    beside = folder.with_name(f".{folder.name}.part")
    _alike(allowed, texts)
    _by_rank_0(lambda: _prepare(beside, _needed(shared, own)), texts)

    def name() -> None:
        allowed()
        _name(beside, folder, manifest.text(step, dist.world(), files))

    try:
        files = _written(beside, shared, own, texts)
        _by_rank_0(name, texts)
    except NotSaved:
        if dist.rank() == 0:
            # Its space may be what the disk lacks.
            shutil.rmtree(beside, ignore_errors=True)
        raise
    if dist.rank() == 0:
        _prune(folder, keep)
    # Nobody begins the next one before the old ones are gone.
    texts("")


def _needed(shared: dict[str, Any], own: dict[str, Any]) -> int:
    """Bytes of all ranks' files."""
    return _bytes(shared) + _bytes(_backbones(shared)) + dist.world() * _bytes(own)


def _prepare(beside: Path, needed: int) -> None:
    """Makes the empty folder; raises OSError where the disk has less than the needed bytes free."""
    parent = beside.parent
    # Not its parents: where the run's folder is gone, so is the rest of the run.
    parent.mkdir(exist_ok=True)
    # Of a save that was killed; its space is needed.
    shutil.rmtree(beside, ignore_errors=True)
    with naming(parent):
        disk = shutil.disk_usage(parent)
    # Some file systems do not know their size.
    if disk.total and disk.free < needed + _SPARE:
        told = f"{needed / 1e6:.1f} MB are needed and {disk.free / 1e6:.1f} MB are free"
        raise OSError(0, told, str(parent))
    beside.mkdir()


def _written(
    beside: Path, shared: dict[str, Any], own: dict[str, Any], texts: Texts
) -> dict[str, Any]:
    """Writes this rank's files.  Returns {name: size and digest} of all ranks'."""
    mine: dict[str, Callable[[IO[bytes]], object]]
    mine = {f"rank_{dist.rank()}.pt": lambda f: torch.save(own, f)}
    if dist.rank() == 0:
        mine["state.pt"] = lambda f: torch.save(shared, f)
        for name, weights in _backbones(shared).items():
            mine[name] = lambda f, weights=weights: f.write(as_safetensors(weights))
    try:
        result = {"files": {name: _to_disk(beside / name, x) for name, x in mine.items()}}
    except OSError as e:
        result = {"error": told(e)}
    results = [json.loads(text) for text in texts(json.dumps(result))]
    if error := next((x["error"] for x in results if "error" in x), ""):
        raise NotSaved(error)
    return {name: about for x in results for name, about in x["files"].items()}


def _backbones(shared: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """{file name: weights} of each student's backbone under timm's names:
    timm.create_model(arch, num_classes=0, checkpoint_path=...) loads it."""
    found, begin = {}, "backbone."
    for item, weights in shared.items():
        name, _, what = item.rpartition("/")
        if what == "student":
            own = {k.removeprefix(begin): x for k, x in weights.items() if k.startswith(begin)}
            found[f"backbone-{name}.safetensors" if name else "backbone.safetensors"] = own
    return found


def _to_disk(path: Path, write: Callable[[IO[bytes]], object]) -> dict[str, Any]:
    """Returns the size and digest of what is written to the file, which may not go back in it."""
    with naming(path), path.open("wb") as f:
        hashed = _Hashed(f)
        try:
            write(cast(IO[bytes], hashed))
        except RuntimeError:
            # torch's writer tells of the file's error in words of its own.
            if hashed.error:
                raise hashed.error from None
            raise
        f.flush()
        os.fsync(f.fileno())
    return {"size": hashed.size, "sha256": hashed.digest.hexdigest()}


class _Hashed:
    """A file that is written to once from its start, with the digest of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            n = self.file.write(content)
        except OSError as e:
            self.error = e
            raise
        self.digest.update(content)
        self.size += n
        return n

    def flush(self) -> None:
        self.file.flush()


def _name(beside: Path, folder: Path, listed: str) -> None:
    """Gives the written files their folder's name, and the name to `last`."""
    write_whole(beside / manifest.NAME, listed)
    sync(beside)
    shutil.rmtree(folder, ignore_errors=True)
    with naming(folder):
        os.replace(beside, folder)
    write_whole(folder.parent / "last", folder.name)
    # `last` is on disk before an older checkpoint goes.
    sync(folder.parent)


def _prune(folder: Path, keep: int) -> None:
    """Removes what is not among the `keep` newest checkpoints up to this one, which `last` names.

    A later step's is of a training that was given up: somebody has written an older checkpoint's
    name into `last`, or it was damaged, and this one continues from there."""
    try:
        steps = checkpoints(folder.parent.parent)
        kept = steps[: steps.index(folder) + 1][-keep:]
        for step in steps:
            if step not in kept:
                shutil.rmtree(step)
    except OSError as e:
        say(f"an old checkpoint stays for now: {told(e)}")


def _by_rank_0(action: Callable[[], None], texts: Texts) -> None:
    """Rank 0 does it while the others wait; raises its error as NotSaved on every rank."""
    _alike(action if dist.rank() == 0 else lambda: None, texts)


def _alike(action: Callable[[], None], texts: Texts) -> None:
    """Every rank does it; raises the first error as NotSaved on every rank."""
    error = ""
    try:
        action()
    except OSError as e:
        error = told(e)
    except UserError as e:
        error = str(e)
    if error := next(filter(None, texts(error)), ""):
        raise NotSaved(error)


def _bytes(value: Any) -> int:
    """Bytes of the tensors in nested dicts."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value.values())) if isinstance(value, dict) else 0
