"""The manifest of a folder of tars that `fastdisco data pack` wrote: counts, classes, and of each
tar size, samples and SHA-256, with a checksum over all of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import open_regular

MANIFEST = "manifest.json"  # of a set that `fastdisco data pack` wrote
BEGUN = "manifest.part.json"  # of one that it has not finished
VERSION = 1
# Its keys.  A JSON file with OURS of them is a manifest of ours, perhaps damaged.
KEYS = {
    *("version", "seed", "shard_bytes", "source", "samples"),
    *("bytes", "classes", "class_counts", "tars"),
}
OURS = 5


def manifest_of(root: Path, tars: list[str] | None) -> dict[str, Any] | None:
    """The manifest of a folder that was packed here, None of any other folder.

    tars: names that must be those of the manifest; None: any.
    Raises UserError for a pack that was not finished, a damaged manifest, or other tars."""
    if (root / BEGUN).exists():
        raise UserError(
            f"{root}: packing it was not finished; give the same `fastdisco data pack` command "
            "again"
        )
    try:
        with open_regular(root / MANIFEST) as f:
            manifest = json.loads(f.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{root / MANIFEST}: cannot be read ({e}); pack the data again") from None
    if not isinstance(manifest, dict) or len(manifest.keys() & KEYS) < OURS:
        return None  # another tool's
    if why := fault(manifest):
        raise UserError(
            f"{root / MANIFEST}: damaged ({why}); copy it again, or pack the data again"
        )
    if tars is not None:
        if missing := sorted(set(manifest["tars"]) - set(tars)):
            raise UserError(
                f"{root}: {shorten(missing)} of {MANIFEST} is missing; copy the whole folder again"
            )
        if strange := sorted(set(tars) - set(manifest["tars"])):
            raise UserError(
                f"{root}: {shorten(strange)} is not in {MANIFEST}; move it out of the folder"
            )
    return manifest


def text_of(manifest: dict[str, Any]) -> str:
    """The content of a manifest's file: the manifest and its checksum."""
    return json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1)


def _checksum(manifest: dict[str, Any]) -> str:
    content = {k: v for k, v in manifest.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def fault(manifest: dict[str, Any]) -> str:
    """What is wrong with a manifest of ours, empty where nothing is.  Those of older versions have
    no checksum."""
    if missing := sorted(KEYS - manifest.keys()):
        return f"it has no {shorten(missing)}"
    if strange := sorted(manifest.keys() - KEYS - {"checksum"}):
        return f"{shorten(strange)} is no key of it"
    if "checksum" in manifest and manifest["checksum"] != _checksum(manifest):
        return "its checksum does not fit"
    # Not by ==, for true is 1.
    if repr(manifest["version"]) != repr(VERSION):
        return f"its version is {manifest['version']!r:.40}, known is {VERSION}"
    try:
        tars, counts = manifest["tars"].values(), manifest["class_counts"]
        samples = sum(t["samples"] for t in tars)
        if samples != manifest["samples"] or sum(t["bytes"] for t in tars) != manifest["bytes"]:
            return "its tars do not add up to its samples and bytes"
        if len(counts) != len(manifest["classes"]) or sum(counts) != samples:
            return "its class_counts do not add up"
    except (AttributeError, KeyError, TypeError):
        return "its values are not of the right kind"
    return ""
