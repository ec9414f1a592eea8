"""Everything an exact resume needs, under portable names.  A crash at any moment leaves the last
checkpoint whole.

RUN/checkpoints/last                     text: the name of the newest folder
RUN/checkpoints/step_00001000/state.pt   what all ranks share, as full named tensors
RUN/checkpoints/step_00001000/rank_0.pt  a rank's own: random state, batch-norm statistics
All files load with torch.load(weights_only=True)."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdisco import engine
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.models import last, mean_buffers, read


class Item(NamedTuple):
    """One thing that a resumed run must have back."""

    # Called on every rank: some gather from all.
    get: Callable[[], Any]
    set: Callable[[Any], Any]
    # Each rank keeps its own; else rank 0 writes one for all.
    own: bool = False


def items(
    student: Any, ema: nn.Module | None, method: nn.Module, loader: Any, name: str = ""
) -> dict[str, Item]:
    """The one list of what a training's state is.

    student  the engine
    loader   anything with a settable `state`
    name     of one of several students: its items are <name>/student, <name>/method ..., and the
             lists of all, joined, are the training's"""
    net, scaler = student.module, engine.scaler(student)
    found = {
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
        # Batch-norm statistics differ by rank.  "student" and "ema" hold their mean over ranks, for
        # evaluations and for a resume on another number of ranks.
        "student_buffers": _buffers(net),
    }
    if ema is not None:
        mean = Item(lambda: ema.state_dict() | mean_buffers(ema), ema.load_state_dict)
        found |= {"ema": mean, "ema_buffers": _buffers(ema)}
    if name:
        found = {f"{name}/{item}": value for item, value in found.items()}
    data = Item(lambda: loader.state, lambda state: setattr(loader, "state", state))
    return found | {"data": data, "rng": Item(_rng, _set_rng, own=True)}


def save(run: Path, step: int, state: dict[str, Item], meta: dict[str, str], keep: int) -> None:
    """Writes step_<step>, points `last` to it and removes all but the `keep` newest; called by
    every rank.

    meta: fingerprints of what the state belongs to (data listing, teacher); `restore` refuses
    others."""
    folder = run / "checkpoints" / f"step_{step:08}"
    beside = folder.with_name(f".{folder.name}.part")
    if dist.rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    # On every rank: some items gather from all.
    values = {name: item.get() for name, item in state.items()}
    own = {name: values[name] for name, item in state.items() if item.own}
    shared = {name: values[name] for name, item in state.items() if not item.own}
    _write(beside / f"rank_{dist.rank()}.pt", {"world": dist.world(), **own})
    if dist.rank() == 0:
        _write(beside / "state.pt", {"step": step, "meta": meta, **shared})
    # Now every rank's file is on disk, and the folder may take its name.
    dist.barrier()
    if dist.rank() == 0:
        _sync(beside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
        write_whole(folder.parent / "last", folder.name)
        # `last` is on disk before an older checkpoint goes.
        _sync(folder.parent)
        _prune(folder, keep)
    dist.barrier()


def _prune(folder: Path, keep: int) -> None:
    """Removes what is not among the `keep` newest checkpoints up to this one, which `last` names.

    A later step's is of a training that was given up: somebody has written an older checkpoint's
    name into `last`, and this one continues from there."""
    steps = sorted(folder.parent.glob("step_*"))
    kept = [step for step in steps if step.name <= folder.name][-keep:]
    for step in steps:
        if step not in kept:
            shutil.rmtree(step)


def restore(run: Path, state: dict[str, Item], meta: dict[str, str]) -> int:
    """Sets every item from the last checkpoint and returns its step; 0 where there is none.

    On another number of ranks than wrote it, each rank starts from the mean batch-norm statistics
    and from its own fresh random state.
    Raises UserError where the checkpoint is damaged, lacks this rank's file, or belongs to other
    data or another teacher."""
    folder = last(run)
    if folder is None:
        return 0
    own_file = folder / f"rank_{dist.rank()}.pt"
    try:
        shared = read(folder / "state.pt")
        own = read(own_file) if own_file.exists() else _of_another_world(own_file)
    except UserError as e:
        raise UserError(
            f"{e}; or write the name of an older checkpoint into {folder.parent / 'last'}",
            anywhere=True,
        ) from None
    for name, value in meta.items():
        if shared["meta"].get(name) != value:
            recorded = " (recorded embeddings, teacher.cache, count as another)"
            raise UserError(
                f"{folder}: was trained with another {name} than this command gives"
                f"{recorded if name == 'teacher' else ''}; take another run.name, or restore the "
                f"{name}"
            )
    for name, item in state.items():
        if not item.own:
            item.set(shared[name])
    if own["world"] == dist.world():
        for name, item in state.items():
            if item.own:
                item.set(own[name])
    return shared["step"]


def _of_another_world(own_file: Path) -> dict[str, Any]:
    """What stands for a rank's file that is not there: fewer ranks have written the checkpoint.

    Raises UserError where as many have, for then the file is lost."""
    others = sorted(own_file.parent.glob("rank_*.pt"))
    wrote = read(others[0])["world"] if others else None
    if wrote == dist.world():
        raise UserError(
            f"{own_file}: is not there, but {wrote} ranks have written the checkpoint; restore it"
        )
    return {"world": None}


def _buffers(net: nn.Module) -> Item:
    """This rank's buffers, copied back in place: others hold references to them."""

    def copy(buffers: dict[str, Tensor]) -> None:
        for name, b in net.named_buffers():
            b.copy_(buffers[name])

    return Item(lambda: dict(net.named_buffers()), copy, own=True)


def _rng() -> dict[str, Tensor | None]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _write(path: Path, value: dict[str, Any]) -> None:
    with path.open("wb") as f:
        torch.save(value, f)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    """Waits until the names in the folder are on disk."""
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
