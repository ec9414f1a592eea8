"""Everything an exact resume needs, under portable names, written so that a crash at any moment
leaves the last checkpoint whole.

RUN/checkpoints/last                    text: the name of the newest folder
RUN/checkpoints/step_00001000/state.pt  what all ranks share, as full named tensors
RUN/checkpoints/step_00001000/rank_0.pt what is each rank's own: random state, batch-norm statistics
All files load with torch.load(weights_only=True)."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdisco import engine
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.models import last, mean_buffers, read


class Item(NamedTuple):
    """One thing a resumed run must have back."""

    get: Callable[[], Any]  # called on every rank
    set: Callable[[Any], None]
    own: bool = False  # each rank keeps its own


def items(
    student, ema: nn.Module | None, method: nn.Module, loader, name: str = ""
) -> dict[str, Item]:
    """The one list of a training's state.  `student` is the engine; `loader` has a settable
    `position`.

    name  of one of several students: its items are <name>/student ..., and the lists of all,
          joined, are the training's"""
    net, scaler = student.module, engine.scaler(student)
    mean = (
        {
            "ema": Item(lambda: ema.state_dict() | mean_buffers(ema), ema.load_state_dict),
            "ema_buffers": Item(
                lambda: dict(ema.named_buffers()), lambda b: _copy_buffers(ema, b), own=True
            ),
        }
        if ema
        else {}
    )
    own = {
        "student": Item(
            lambda: engine.weights(student) | mean_buffers(net),
            lambda weights: engine.load_weights(student, weights),
        ),
        "method": Item(method.state_dict, method.load_state_dict),
        "optimizer": Item(
            lambda: engine.optimizer_state(student),
            lambda state: engine.load_optimizer_state(student, state),
        ),
        # None but for fp16.
        "scaler": Item(
            lambda: scaler and scaler.state_dict(),
            lambda state: scaler and scaler.load_state_dict(state),
        ),
        # statistics differ from rank to rank, and with them the mean over ranks in "student" and
        # "ema"
        "student_buffers": Item(
            lambda: dict(net.named_buffers()), lambda b: _copy_buffers(net, b), own=True
        ),
    }
    return {f"{name}/{item}" if name else item: value for item, value in (mean | own).items()} | {
        "data": Item(
            lambda: loader.position, lambda position: setattr(loader, "position", position)
        ),
        "rng": Item(_rng, _set_rng, own=True),
    }


def save(run: Path, step: int, state: dict[str, Item], meta: dict[str, str], keep: int):
    """Writes step_<step>, points `last` to it and removes all but the `keep` newest; called by
    every rank.

    `meta` names what the state belongs to (data listing, teacher); a resume that differs is
    refused."""
    folder = run / "checkpoints" / f"step_{step:08}"
    beside = folder.with_name(f".{folder.name}.part")
    if dist.rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    # On every rank: some are collective.
    values = {name: item.get() for name, item in state.items()}
    _write(
        beside / f"rank_{dist.rank()}.pt",
        {"world": dist.world(), **{n: v for n, v in values.items() if state[n].own}},
    )
    if dist.rank() == 0:
        _write(
            beside / "state.pt",
            {"step": step, "meta": meta, **{n: v for n, v in values.items() if not state[n].own}},
        )
    dist.barrier()  # every rank's file is on disk
    if dist.rank() == 0:
        _sync(beside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
        write_whole(folder.parent / "last", folder.name)
        _sync(folder.parent)  # `last` is on disk before an older one goes
        for old in sorted(folder.parent.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def restore(run: Path, state: dict[str, Item], meta: dict[str, str]) -> int:
    """Sets every item from the last checkpoint and returns its step; 0 where there is none.

    On another number of ranks each rank starts from the mean statistics and its own fresh random
    state.
    Raises UserError where the checkpoint is damaged or belongs to other data or another teacher."""
    folder = last(run)
    if folder is None:
        return 0
    own_file = folder / f"rank_{dist.rank()}.pt"
    try:
        shared = read(folder / "state.pt")
        own = read(own_file) if own_file.exists() else {"world": None}
    except UserError as e:
        raise UserError(
            f"{e}; or write the name of an older checkpoint into {folder.parent / 'last'}",
            anywhere=True,
        ) from None
    for name, value in meta.items():
        if shared["meta"].get(name) != value:
            raise UserError(
                f"{folder}: was trained with another {name} than this command gives"
                f"{' (recorded embeddings, teacher.cache, count as another)' * (name == 'teacher')}; "
                f"take another run.name, or restore the {name}"
            )
    for name, item in state.items():
        if not item.own:
            item.set(shared[name])
    if own["world"] == dist.world():
        for name, item in state.items():
            if item.own:
                item.set(own[name])
    return shared["step"]


def _copy_buffers(net, buffers):
    for name, b in net.named_buffers():
        b.copy_(buffers[name])


def _rng():
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_rng(state):
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _write(path: Path, value):
    with path.open("wb") as f:
        torch.save(value, f)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path):
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
