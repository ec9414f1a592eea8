"""The networks of our own runs, rebuilt from a run's config.yaml and one of its checkpoints.

RUN/config.yaml                          the configuration
RUN/checkpoints/step_XXXXXXXX/state.pt   the state after a step
RUN/checkpoints/last                     a text file: the name of the newest step_XXXXXXXX
manifest.py has the manifest beside state.pt."""

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from fastdisco import config
from fastdisco.common.errors import UserError
from fastdisco.models import manifest
from fastdisco.models.build import of
from fastdisco.models.net import Net
from fastdisco.models.weights import load_weights, read

_STEP = re.compile(r"step_\d{1,18}", re.ASCII)


def from_run(
    folder: Path, which: str = "student", overrides: Sequence[str] = (), student: str | None = None
) -> tuple[Net, config.Config]:
    """A network of a run, in eval mode and channels_last on the CPU, and its configuration with the
    overrides laid over it.

    folder   the run, whose newest checkpoint is taken, or one of its checkpoints/step_XXXXXXXX
    which    student, or ema for the mean student (EMA)
    student  the name of one, where the run has several
    Raises UserError where the folder holds no checkpoint, or one that does not fit its
    config.yaml."""
    # "." has no parents, its absolute path has.
    folder = Path(folder).absolute()
    step = folder if (folder / "state.pt").is_file() else last(folder)
    if step is None:
        raise UserError(
            f"{folder}: no checkpoint of fastdisco here (no {folder / 'checkpoints' / 'last'}); "
            "give the folder of a run that has saved one"
        )
    state, described = step / "state.pt", step.parent.parent / "config.yaml"
    cfg = _alone(config.load(described, overrides), student, folder)
    content = read(state)
    manifest.refuse_lost(state, content)
    weights = content.get(f"{student}/{which}" if student else which)
    if not isinstance(weights, dict):
        without_ema = f"this run by {cfg.method.name} has no mean student"
        why = without_ema if which == "ema" else "give a checkpoint written by fastdisco/train.py"
        raise UserError(f"{state}: holds no weights named {which}; {why}")
    # Its random weights are overwritten, so drawing them must not move the caller's random stream.
    with torch.random.fork_rng(devices=[]):
        net = of(cfg)
    remedy = f"{described} must be the one that the run was trained with"
    load_weights(net, weights, state, remedy)
    return net.eval().to(memory_format=torch.channels_last), cfg


def last(run: Path) -> Path | None:
    """The folder of a run's newest checkpoint, which RUN/checkpoints/last names; None where the run
    has none yet.

    Raises UserError where `last` is damaged, or that folder has no state.pt."""
    pointer = Path(run) / "checkpoints" / "last"
    if not _is_there(pointer):
        return None
    step = _named(pointer)
    if not (step / "state.pt").is_file():
        raise UserError(
            f"{pointer}: names {step.name}, which holds no state.pt; write a complete folder's "
            "name into it"
        )
    return step


def newest_first(run: Path) -> tuple[list[Path], str]:
    """The folders of the checkpoints that a run may continue from, the newest first: none that is
    later than the one that RUN/checkpoints/last names.

    Where `last` is lost or damaged, or names what is not there, it is all of them, and the second
    value is a clause that says what is wrong."""
    pointer = Path(run) / "checkpoints" / "last"
    steps = checkpoints(run)[::-1]
    if not _is_there(pointer):
        return steps, f"{pointer}: is not there" if steps else ""
    try:
        step = _named(pointer)
    except UserError as e:
        return steps, str(e)
    if step not in steps:
        return steps, f"{pointer}: names {step.name}, which is not there"
    return steps[steps.index(step) :], ""


def checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, the oldest first; a copy of a user's, such as
    step_00001000.good, is none of them.  Raises OSError where that cannot be seen."""
    folder = Path(run) / "checkpoints"
    try:
        # Not by a glob: to that, a folder that may not be read is an empty one.
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    found = [folder / name for name in names if _STEP.fullmatch(name)]
    return sorted((p for p in found if p.is_dir()), key=_number)


def _is_there(path: Path) -> bool:
    """As os.path.lexists, to which what may not be seen is not there."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _number(step: Path) -> int:
    return int(step.name.removeprefix("step_"))


def _named(pointer: Path) -> Path:
    """The folder that the file `last` names, which need not be there."""
    try:
        # Opening a pipe would wait for its other end.
        if pointer.exists() and not pointer.is_file():
            raise OSError(errno.EINVAL, "not a file")
        with pointer.open("rb") as f:
            # Whatever it is, no name is longer.
            name = f.read(1000).decode("ascii", errors="replace").strip()
    except OSError as e:
        raise UserError(
            f"{pointer}: cannot be read ({e.strerror}); write the name of a folder there into it"
        ) from None
    if not _STEP.fullmatch(name):
        raise UserError(
            f"{pointer}: names no checkpoint; write the name of a folder there into it, such as "
            "step_00001000"
        )
    return pointer.parent / name


def _alone(cfg: config.Config, student: str | None, folder: Path) -> config.Config:
    """The configuration of one student of the run."""
    found = config.students(cfg)
    if (student or "") in found:
        return found[student or ""]
    # A run with a single student has it under ''.
    names = ", ".join(name for name in found if name)
    problem = f"no student {student}" if student else "several students"
    if names:
        remedy = f"name one of {names} (--student, or teacher.student)"
    else:
        remedy = "it trained a single one: leave its name out"
    raise UserError(f"{folder}: has {problem}; {remedy}")
