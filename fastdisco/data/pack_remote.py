"""Packing to object storage: tars are written on local disk, uploaded one by one, and emptied there.

The manifest comes last, so a pack that is not finished is refused as one on disk is."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.common.urls import Url
from fastdisco.data import objects, tar_index
from fastdisco.data.cache import locked
from fastdisco.data.manifest import BEGUN, MANIFEST
from fastdisco.data.remote import folder_of

# (folder, what is done with each tar that is whole) -> the manifest.
Write = Callable[[Path, Callable[[Path], None]], dict[str, Any]]


def to(url: Url, write: Write, quarantine: str) -> dict[str, Any]:
    """Has `write` write tars, which become objects of the folder at url, with index and manifest.
    Returns the manifest.  After a kill, the same command goes on, on the same machine without
    writing the tars again.

    quarantine: the name of that file, which goes along where `write` makes one.
    Raises UserError where the folder holds other things."""
    found = objects.listed(url)
    stage = folder_of(None) / "pack" / hashlib.sha256(str(url).encode()).hexdigest()[:32]
    stage.mkdir(parents=True, exist_ok=True)
    with locked(stage.with_suffix(".lock"), wait=False) as alone:
        if not alone:
            raise UserError(f"{url}: another command packs there; wait for it")
        marks = [name for name in (MANIFEST, BEGUN) if name in found]
        if found and not marks:
            raise UserError(
                f"{url}: not empty and not begun by this command; give an empty or new folder"
            )
        if not marks:
            # What is left here is of a pack whose objects are gone.
            shutil.rmtree(stage)
            stage.mkdir()
        for name in marks:
            write_whole(stage / name, objects.read(found[name]).decode())
        try:
            manifest = write(stage, lambda tar: _send(tar, url))
        except UserError as e:
            raise UserError(str(e).replace(str(stage), str(url))) from None
        if MANIFEST not in found:
            _finish(stage, url, manifest, quarantine)
        shutil.rmtree(stage)
    return manifest


def _send(tar: Path, url: Url) -> None:
    """Uploads a tar and its index, once, and gives back the disk's space."""
    begun, sent = tar.with_name(BEGUN), tar.with_suffix(".sent")
    if sent.exists():
        return
    # Before the first tar: from now on the folder says that it is not finished.
    objects.write(url / BEGUN, begun.read_bytes())
    objects.upload(tar, url / tar.name)
    index = tar_index.path_of(tar)
    objects.upload(index, url / index.name)
    sent.touch()
    # Its size is what says that it is whole, should this command be killed.
    size = tar.stat().st_size
    os.truncate(tar, 0)
    os.truncate(tar, size)


def _finish(stage: Path, url: Url, manifest: dict[str, Any], quarantine: str) -> None:
    found = objects.listed(url)
    sizes = {name: about.size for name, about in found.items()}
    if lost := [n for n, t in manifest["tars"].items() if sizes.get(n) != t["bytes"]]:
        raise UserError(
            f"{url}: {lost[0]} is not there as it was uploaded; remove the folder there and {stage}, "
            "then give the same command again"
        )
    if (stage / quarantine).exists():
        objects.upload(stage / quarantine, url / quarantine)
    objects.upload(stage / MANIFEST, url / MANIFEST)
    objects.remove(url / BEGUN)
