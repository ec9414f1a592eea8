"""The folder of a run: its resolved configuration, its environment, and whether a command may
continue it."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastdisco import config
from fastdisco.common import dist, temporary
from fastdisco.common.console import say, shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.config import Config
from fastdisco.run import agreement, watchdog
from fastdisco.run.environment import environment
from fastdisco.run.lock import Lock

# Keys that a resumed run may change, since they alter neither the weights nor what they mean.  Data
# and teacher may lie elsewhere: `checkpoint.restore` compares their contents.
_FREE = (
    "run.out",
    "run.max_steps",
    "run.mirror",
    "run.stall_seconds",
    "data.train",
    "data.val",
    "data.quarantine",
    "data.accumulate",
    "data.bad_limit",
    "data.cache",
    "data.cache_gb",
    "data.threads",
    "data.prefetch",
    "data.copy_views",
    "data.eval_batch",
    "teacher.file",
    "teacher.sha256",
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


# What a training and its evaluations write into its folder.
# config.yaml goes last: a folder without it is no run, and one that lost it midway
# would be refused from then on.
_OURS = (
    "env.json",
    "metrics.jsonl",
    "tb",
    "wandb",
    "loggers.json",
    "checkpoints",
    "eval",
    "export",
    "config.yaml",
)
# What `clear` calls checkpoints/ while it deletes it.
ASIDE = ".checkpoints.part"


def claim(cfg: Config, overwrite: bool = False, lock: Lock | None = None) -> Path:
    """The folder out/name, where this command may start or continue a run, or `clear` the one that
    is there (overwrite).  Called by every rank.

    lock  is taken by rank 0, so that no other command trains in the folder.
    Raises UserError where the folder holds a run of another configuration, naming what differs and
    the two ways out, holds no run at all, is being trained in, or is not the same for all ranks."""
    folder = agree(cfg, overwrite)
    if lock:
        agreement.same_folder(folder, _locked(folder, lock))
        # Another training may have ended between the first look and the lock.
        agree(cfg, overwrite)
        _tidy(folder)
    return folder


def clear(folder: Path) -> None:
    """Deletes the run in the folder, and says what else is there and stays.  Called by every rank;
    `claim` comes before, which refuses folders of other things."""
    dist.alike(lambda: None if dist.rank() else _clear(folder))


def agree(cfg: Config, overwrite: bool = False) -> Path:
    """The same folder and the same errors as `claim`, but nothing is locked or deleted."""
    folder = cfg.run.out / cfg.run.name
    # The folder, or what it would lie in.
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file, and the run needs a folder; take another run.out")
    if folder.exists() and not (folder / "config.yaml").exists() and any(_visible(folder)):
        raise UserError(
            f"{folder}: holds files but no run (no config.yaml), so nothing is written or deleted "
            "there; take another run.name or run.out"
        )
    if not overwrite:
        refuse_other_run(cfg, folder)
    elif (folder / "config.yaml").exists():
        _of_a_run(folder)
    return folder


def describe(cfg: Config, folder: Path) -> None:
    """Writes config.yaml and env.json.  Call it when the run is known to belong to this data and
    teacher."""
    dist.alike(lambda: None if dist.rank() else _describe(cfg, folder))


def _describe(cfg: Config, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.yaml", config.dump(cfg))
    write_whole(folder / "env.json", json.dumps(environment(), indent=1) + "\n")


def refuse_other_run(cfg: Config, folder: Path) -> None:
    """Raises UserError where the folder holds a run of another configuration, naming what differs."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    try:
        there = config.load(path)
    # It is not even text, or is nested by the thousand.
    except (ValueError, RecursionError):
        raise UserError(
            f"{path}: is no configuration; restore it from a copy, or take another run.name"
        ) from None
    old, new = (config.flatten(c.model_dump(mode="json")) for c in (there, cfg))
    changed = (k for k in sorted(old | new) if old.get(k) != new.get(k))
    differ = [
        f"{k} ({old.get(k)} there, {new.get(k)} here)" for k in changed if not k.startswith(_FREE)
    ]
    if differ:
        raise UserError(
            f"{folder}: holds a run of another configuration: {', '.join(differ)}; give this one "
            "another run.name, or start over with --overwrite"
        )


def _locked(folder: Path, lock: Lock) -> str:
    """Rank 0 takes the lock; returns its id, or raises rank 0's error on every rank."""

    def take() -> str:
        mark = lock.take(folder)
        # No rank of this attempt has a heartbeat yet: they wait for this one.
        watchdog.forget(folder)
        return mark

    return dist.alike(lambda: "" if dist.rank() else take())


def _clear(folder: Path) -> None:
    aside = folder / ASIDE
    if aside.exists():
        shutil.rmtree(aside)
    # At once: half of a checkpoint's folder is not to be continued from.
    if (folder / "checkpoints").is_dir():
        os.replace(folder / "checkpoints", aside)
        shutil.rmtree(aside)
    for name in _OURS:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    left = sorted(p.name for p in _visible(folder)) if folder.exists() else []
    if left:
        say(f"{folder}: --overwrite left what is not of the run: {shorten(left)}")


def _tidy(folder: Path) -> None:
    """Removes what killed trainings have left: of this run, whose lock is held, and in TMPDIR."""
    if dist.rank() == 0:
        checkpoints = folder / "checkpoints"
        for part in (folder / ASIDE, *checkpoints.glob(".step_*.part")):
            shutil.rmtree(part, ignore_errors=True)
        temporary.sweep(folder, checkpoints, folder / "eval")
    if dist.local_rank() == 0:
        temporary.sweep_tmpdir()


def _visible(folder: Path) -> Iterator[Path]:
    """All but a lock, heartbeats and what a killed start may have left: hidden files of ours."""
    for path in folder.iterdir():
        ours = path.name in (".lock", watchdog.NAME)
        if not ours and not (path.name[0] == "." and path.suffix == ".part"):
            yield path


def _of_a_run(folder: Path) -> None:
    """Raises UserError where config.yaml is somebody else's: then the folder is no run of ours."""
    try:
        config.load(folder / "config.yaml")
    # ValueError: it is not even text.
    except (UserError, ValueError, RecursionError) as e:
        raise UserError(
            f"--overwrite: deletes runs alone, and {folder}/config.yaml is not that of a run ({e}); "
            "take another run.name or run.out, or delete the folder yourself"
        ) from None
