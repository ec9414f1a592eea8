"""The manifest of a checkpoint: size and SHA-256 of each of its files.

STEP/manifest.json  {"fastdisco": 1, "step": N, "world": how many ranks have written it,
                     "files": {"state.pt": {"size": bytes, "sha256": digest}, "rank_0.pt": ...}}
Checkpoints of older versions of fastdisco have none."""

import json
import re
from pathlib import Path
from typing import Any

from fastdisco.common.errors import UserError
from fastdisco.common.files import read_json, sha256

NAME = "manifest.json"
# Files that no checkpoint lists are a user's, but for these.
_NEEDED = re.compile(r"state\.pt|rank_\d+\.pt")


def text(step: int, world: int, files: dict[str, dict[str, Any]]) -> str:
    """The manifest's content.  files: {name: {"size": bytes, "sha256": digest}}; world: how many
    ranks have written them."""
    found = {"fastdisco": 1, "step": step, "world": world, "files": files}
    return json.dumps(found, indent=1) + "\n"


def verify(file: Path) -> None:
    """Raises UserError unless a checkpoint's file is the one that the manifest beside it lists.

    Nothing happens where there is no manifest, or where file and manifest are not a checkpoint's."""
    files = _files(file.with_name(NAME))
    if files is None or (file.name not in files and not _NEEDED.fullmatch(file.name)):
        return
    listed = files.get(file.name)
    if not isinstance(listed, dict):
        raise UserError(f"{file}: is not in the {NAME} beside it; restore the folder from a copy")
    size = file.stat().st_size
    if size != listed.get("size"):
        raise UserError(
            f"{file}: has {size} bytes instead of the {listed.get('size')} that {NAME} lists; "
            "restore it from a copy"
        )
    if sha256(file) != listed.get("sha256"):
        raise UserError(
            f"{file}: is damaged or of another checkpoint or rank (its SHA-256 is not the one in "
            f"{NAME}); restore it from a copy"
        )


def refuse_lost(state: Path, content: dict[str, Any]) -> None:
    """Raises UserError where state.pt, whose content is given, had a manifest that is gone."""
    if "world" in content and not state.with_name(NAME).exists():
        raise UserError(f"{state.with_name(NAME)}: is gone; restore it from a copy")


def _files(path: Path) -> dict[str, Any] | None:
    """What a manifest lists; None where there is none, or where it is no checkpoint's."""
    ours = path.parent.name.startswith("step_")
    found: Any = None
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        pass
    marked = isinstance(found, dict) and found.get("fastdisco") == 1
    if not ours and not marked:
        return None
    if not marked or not isinstance(found.get("files"), dict):
        raise UserError(f"{path}: is no manifest of a checkpoint; restore it from a copy")
    return found["files"]
