"""The networks of our own runs, rebuilt from a run's config.yaml and one of its checkpoints.

RUN/config.yaml                          the configuration
RUN/checkpoints/step_XXXXXXXX/state.pt   the state after a step
RUN/checkpoints/last                     a text file: the name of the newest step_XXXXXXXX"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from fastdisco import config
from fastdisco.common.errors import UserError
from fastdisco.common.files import open_regular
from fastdisco.models.build import of
from fastdisco.models.net import Net
from fastdisco.models.weights import load_weights, read


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
    weights = read(state).get(f"{student}/{which}" if student else which)
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

    Raises UserError where that folder has no state.pt."""
    pointer = Path(run) / "checkpoints" / "last"
    if not pointer.exists():
        return None
    step = _named(pointer)
    if not (step / "state.pt").is_file():
        raise UserError(
            f"{pointer}: names {step.name}, which holds no state.pt; write a complete folder's "
            "name into it"
        )
    return step


def _named(pointer: Path) -> Path:
    """The folder that the file `last` names, which need not be there."""
    try:
        with open_regular(pointer) as f:
            # Whatever it is, no name is longer.
            name = f.read(1000).decode("ascii", errors="replace").strip()
    except OSError as e:
        raise UserError(
            f"{pointer}: cannot be read ({e.strerror}); write the name of a folder there into it"
        ) from None
    if not re.fullmatch(r"step_\d{1,18}", name, re.ASCII):
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
