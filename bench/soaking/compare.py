"""What two runs have in common: losses of their logs, tensors of their checkpoints, digests of files."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from harness import ROOT


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of each whole line of a log that has one."""
    found = []
    try:
        text = (run / "metrics.jsonl").read_bytes()
    except OSError:
        return []
    for line in text.split(b"\n"):
        try:
            entry = json.loads(line)
            if "train/loss" in entry:
                found.append((entry["step"], entry["train/loss"]))
        # The line that is being written, or was when the process was killed.
        except (ValueError, TypeError):
            continue
    return found


def code() -> str:
    """A digest of the project's code, which a reference belongs to."""
    files = sorted(f for name in ("fastdisco", "kernels") for f in (ROOT / name).rglob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:8]


def is_whole(checkpoint: Path) -> bool:
    """Whether the files that a run continues from are those that the manifest lists."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        return all(
            hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == about["sha256"]
            for name, about in files.items()
            if name.endswith(".pt")
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def apart(action: Callable[[], list[str]]) -> list[str]:
    """The action's result from a process of its own: here no library may start threads."""
    here, there = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(here)
        text = "failed"
        try:
            text = json.dumps(action())
        finally:
            with os.fdopen(there, "w") as f:
                f.write(text)
            os._exit(0)
    os.close(there)
    with os.fdopen(here) as f:
        text = f.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text != "failed" else ["the comparison failed"]


def differences(a: Path, b: Path, world: int) -> list[str]:
    """Names of what the newest checkpoints of two runs of that many ranks do not have bit-equal."""
    import torch

    from fastdisco import config, models

    found = []
    for name in ("state.pt", *(f"rank_{r}.pt" for r in range(world))):
        x, y = (config.flatten(models.read(models.last(run) / name)) for run in (a, b))
        if x.keys() != y.keys():
            found.append(f"{name}: {sorted(x.keys() ^ y.keys())[:3]}")
        for key in x.keys() & y.keys():
            tensor = torch.is_tensor(x[key])
            if not (torch.equal(x[key], y[key]) if tensor else x[key] == y[key]):
                found.append(f"{name}: {key}")
    return found
