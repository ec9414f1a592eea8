"""Everything an exact resume needs, under portable names.  A crash at any moment leaves the last
checkpoint whole.

RUN/checkpoints/last                          text: the name of the newest folder
RUN/checkpoints/step_00001000/state.pt        what all ranks share, as full named tensors
RUN/checkpoints/step_00001000/rank_0.pt       a rank's own: random state, batch-norm statistics
RUN/checkpoints/step_00001000/backbone.safetensors
                                              the student's backbone alone, for timm and others; nothing
                                              here reads it.  backbone-NAME... for each of several
RUN/checkpoints/step_00001000/manifest.json   size and SHA-256 of these files
The .pt files load with torch.load(weights_only=True)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdisco import engine
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.models import last, manifest, mean_buffers, newest_first, read
from fastdisco.run import fit, saving

__all__ = ["Item", "gathered", "items", "last", "restore", "save"]


class Item(NamedTuple):
    """One thing that a resumed run must have back."""

    # Called on every rank: some gather from all.
    get: Callable[[], Any]
    set: Callable[[Any], Any]
    # Each rank keeps its own; else rank 0 writes one for all.
    own: bool = False
    # Of an item that each rank keeps, in place of `set` where another number of ranks has saved it;
    # takes the step.
    fresh: Callable[[int], Any] = lambda step: None
    # Raises ValueError where what a checkpoint holds is not what `set` takes.
    check: Callable[[Any], Any] = lambda found: None


def items(
    student: Any, ema: nn.Module | None, method: nn.Module, loader: Any, name: str = ""
) -> dict[str, Item]:
    """The one list of what a training's state is.

    student  the engine
    loader   anything with a settable `state`
    name     of one of several students: its items are <name>/student, <name>/method ..., and the
             lists of all, joined, are the training's"""
    net, scaler = student.module, engine.scaler(student)
    scaling = lambda: scaler.state_dict() if scaler else None
    # At ZeRO stage 3 a parameter is empty, and its shape is elsewhere.
    shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in net.named_parameters()}
    groups = student.basic_optimizer.param_groups if hasattr(student, "basic_optimizer") else []
    found = {
        "student": Item(
            lambda: engine.weights(student) | mean_buffers(net),
            lambda weights: engine.load_weights(student, weights),
            check=lambda x: fit.state_dict(x, net.state_dict(), shapes=False),
        ),
        "method": Item(
            method.state_dict,
            method.load_state_dict,
            check=lambda x: fit.state_dict(x, method.state_dict()),
        ),
        "optimizer": Item(
            lambda: engine.optimizer_state(student),
            lambda state: engine.load_optimizer_state(student, state),
            check=lambda x: fit.optimizer(x, shapes, groups),
        ),
        # None but for fp16.
        "scaler": Item(
            scaling,
            lambda state: scaler and scaler.load_state_dict(state),
            check=lambda x: fit.scaler(x, scaling()),
        ),
        # Batch-norm statistics differ by rank.  "student" and "ema" hold their mean over ranks, for
        # evaluations and for a resume on another number of ranks.
        "student_buffers": _buffers(net),
    }
    if ema is not None:
        mean = Item(
            lambda: ema.state_dict() | mean_buffers(ema),
            ema.load_state_dict,
            check=lambda x: fit.state_dict(x, ema.state_dict(), shapes=False),
        )
        found |= {"ema": mean, "ema_buffers": _buffers(ema)}
    if name:
        found = {f"{name}/{item}": value for item, value in found.items()}
    data = Item(
        lambda: loader.state, lambda state: setattr(loader, "state", state), check=fit.loader
    )
    rng = Item(_rng, _set_rng, own=True, check=fit.random, fresh=_fresh_rng)
    return found | {"data": data, "rng": rng}


def save(run: Path, step: int, state: dict[str, Item], meta: dict[str, str], keep: int) -> None:
    """Writes step_<step>, points `last` to it and removes all but the `keep` newest; called by
    every rank.

    meta: fingerprints of what the state belongs to (data listing, teacher); `restore` refuses
    others.
    Raises NotSaved, on every rank alike, where the file system fails."""
    saving.write(run, step, *gathered(step, state, meta), keep)


def gathered(
    step: int, state: dict[str, Item], meta: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all ranks share, and what is this rank's own.  Called by every rank."""
    # On every rank: some items gather from all.
    values = {name: item.get() for name, item in state.items()}
    own = {name: values[name] for name, item in state.items() if item.own}
    shared = {name: values[name] for name, item in state.items() if not item.own}
    return (
        {"step": step, "meta": meta, "world": dist.world(), **shared},
        {"world": dist.world(), "rank": dist.rank(), **own},
    )


def restore(run: Path, state: dict[str, Item], meta: dict[str, str]) -> int:
    """Sets every item from the newest whole checkpoint and returns its step; 0 where there is none.
    Called by every rank.

    Where `last` or the checkpoint that it names is damaged on any rank, all ranks continue from the
    newest that is whole, which is said.
    On another number of ranks than wrote it, each rank starts from the mean batch-norm statistics
    and from a random state of (seed, rank, step).
    Raises UserError, on every rank alike, where none is whole, or where the checkpoint belongs to
    other data or another teacher."""
    steps, problem = newest_first(run)
    problems = [problem] if problem else []
    for folder in steps:
        try:
            found = dist.alike(_read, folder, state)
        except UserError as e:
            problems.append(str(e))
            continue
        _refuse_other(folder, found.shared["meta"], meta)
        _set(found, state, folder)
        _say_found(folder, problems)
        return found.shared["step"]
    if not problems:
        return 0
    raise UserError(
        f"{'; '.join(problems)}; with no whole checkpoint the run cannot continue: give it one, or "
        "start over with --overwrite"
    )


class _Found(NamedTuple):
    """A checkpoint's content: what all ranks share, and this rank's own; None where another number
    of ranks has written it."""

    shared: dict[str, Any]
    own: dict[str, Any] | None


def _read(folder: Path, state: dict[str, Item]) -> _Found:
    """Raises UserError where a file is damaged, or this rank's is lost or another rank's."""
    path = folder / "state.pt"
    shared = read(path)
    manifest.refuse_lost(path, shared)
    shares = {k: v.check for k, v in state.items() if not v.own}
    _refuse_misfit(path, shared, {"step": _of_folder(folder), "meta": _texts, **shares})
    path = folder / f"rank_{dist.rank()}.pt"
    if world_of(folder, shared) != dist.world():
        return _Found(shared, None)
    if not path.exists():
        raise UserError(
            f"{path}: is not there, but {dist.world()} ranks have written the checkpoint; restore it"
        )
    own = read(path)
    if (rank := own.get("rank", dist.rank())) != dist.rank():
        raise UserError(f"{path}: is the file of rank {str(rank)[:9]}; restore the right one")
    _refuse_misfit(path, own, {k: v.check for k, v in state.items() if v.own})
    return _Found(shared, own)


def world_of(folder: Path, shared: dict[str, Any]) -> int | None:
    """How many ranks have written the checkpoint; None where nothing says it."""
    if "world" in shared:
        world = shared["world"]
    else:
        # An older version's.
        others = sorted(folder.glob("rank_*.pt"))
        world = read(others[0]).get("world") if others else None
    return world if type(world) is int else None


def _refuse_misfit(
    path: Path, found: dict[str, Any], checks: dict[str, Callable[[Any], Any]]
) -> None:
    """Raises UserError where an item is not there, or is not what the run takes."""
    for name, check in checks.items():
        if name not in found:
            raise UserError(f"{path}: lacks {name}; restore the file from a copy")
        try:
            check(found[name])
        except ValueError as e:
            raise UserError(
                f"{path}: {name} is not what this run saves: {e}; restore the file from a copy"
            ) from None


def _of_folder(folder: Path) -> Callable[[Any], None]:
    number = int(folder.name.removeprefix("step_"))

    def check(step: Any) -> None:
        if type(step) is not int or step != number:
            raise ValueError(f"{str(step)[:20]} in the folder of {number}")

    return check


def _texts(meta: Any) -> None:
    if not isinstance(meta, dict) or not all(isinstance(x, str) for x in meta.values()):
        raise ValueError("no dict of texts")


def _refuse_other(folder: Path, there: dict[str, str], here: dict[str, str]) -> None:
    for name, value in here.items():
        if there.get(name) != value:
            recorded = " (recorded embeddings, teacher.cache, count as another)"
            raise UserError(
                f"{folder}: was trained with another {name} than this command gives"
                f"{recorded if name == 'teacher' else ''}; take another run.name, or restore the "
                f"{name}"
            )


def _set(found: _Found, state: dict[str, Item], folder: Path) -> None:
    """Raises UserError where an item refuses what its check has let through."""
    for name, item in state.items():
        content = found.own if item.own else found.shared
        try:
            if content is None:
                item.fresh(found.shared["step"])
            else:
                item.set(content[name])
        # torch's own are RuntimeErrors of several lines.
        except Exception as e:
            first = (str(e) or type(e).__name__).splitlines()[0][:200]
            raise UserError(
                f"{folder}: {name} is not what this run saves: {first}; write the name of an older "
                f"checkpoint into {folder.parent / 'last'}"
            ) from e


def _say_found(folder: Path, problems: list[str]) -> None:
    """Says where the run continues, if not where it should, and what could not be checked."""
    if problems:
        say(f"{'; '.join(problems)}; continuing from {folder.name}, the newest whole checkpoint")
    if not (folder / manifest.NAME).exists():
        say(
            f"{folder}: an older version of fastdisco wrote it without {manifest.NAME}, so only the "
            "checksums inside its files were compared"
        )


def _buffers(net: nn.Module) -> Item:
    """This rank's buffers, copied back in place: others hold references to them."""

    def copy(buffers: dict[str, Tensor]) -> None:
        for name, b in net.named_buffers():
            b.copy_(buffers[name])

    own = lambda: dict(net.named_buffers())
    return Item(own, copy, own=True, check=lambda x: fit.state_dict(x, own()))


def _rng() -> dict[str, Tensor | None]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _fresh_rng(step: int) -> None:
    """Not the state of the start, whose draws the first steps had."""
    # The seed that the training has set, of its seed and this rank.
    torch.manual_seed(dist.mix(torch.initial_seed(), step))


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
