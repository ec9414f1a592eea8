"""The folder of a run: its resolved configuration, its environment, and whether a command may
continue it."""

import json
import shutil
from pathlib import Path

from fastdisco import config
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.config import Config
from fastdisco.run.environment import environment

# Keys that a resumed run may change, since they alter neither the weights nor what they mean.  Data
# and teacher may lie elsewhere: `checkpoint.restore` compares their contents.
_FREE = (
    "run.out",
    "run.max_steps",
    "data.train",
    "data.val",
    "data.quarantine",
    "data.threads",
    "data.prefetch",
    "data.copy_views",
    "data.eval_batch",
    "teacher.file",
    "teacher.student",
    "teacher.cache",
    "teacher.cache_folder",
    "teacher.graph",
    "engine.stage",
    "engine.overlap",
    "engine.bucket_mb",
    "perf.",
    "eval.",
    "log.",
    "checkpoint.",
)


def claim(cfg: Config, overwrite: bool = False) -> Path:
    """The folder out/name, where this command may start or continue a run; with `overwrite` the run
    there is deleted.  Called by every rank.

    Raises UserError where the folder holds a run of another configuration, naming what differs and
    the two ways out, or holds no run at all."""
    folder = agree(cfg, overwrite)
    # Every rank has looked before rank 0 deletes.
    dist.barrier()
    if overwrite and dist.rank() == 0 and folder.exists():
        shutil.rmtree(folder)
    dist.barrier()
    return folder


def agree(cfg: Config, overwrite: bool = False) -> Path:
    """The same folder and the same errors as `claim`, but nothing is deleted."""
    folder = cfg.run.out / cfg.run.name
    if folder.exists() and not (folder / "config.yaml").exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder}: holds files but no run (no config.yaml), so nothing is written or deleted "
            "there; take another run.name or run.out"
        )
    if not overwrite:
        _agree(cfg, folder)
    return folder


def describe(cfg: Config, folder: Path) -> None:
    """Writes config.yaml and env.json.  Call it when the run is known to belong to this data and
    teacher."""
    if dist.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.yaml", config.dump(cfg))
        write_whole(folder / "env.json", json.dumps(environment(), indent=1) + "\n")
    dist.barrier()


def _agree(cfg: Config, folder: Path) -> None:
    path = folder / "config.yaml"
    if not path.exists():
        return
    old, new = (config.flatten(c.model_dump(mode="json")) for c in (config.load(path), cfg))
    changed = (k for k in sorted(old | new) if old.get(k) != new.get(k))
    differ = [
        f"{k} ({old.get(k)} there, {new.get(k)} here)" for k in changed if not k.startswith(_FREE)
    ]
    if differ:
        raise UserError(
            f"{folder}: holds a run of another configuration: {', '.join(differ)}; give this one "
            "another run.name, or start over with --overwrite"
        )
