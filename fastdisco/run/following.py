"""How a run goes on with another number of ranks than it began with: the global batch stays, its
division follows (config/division.py), and what becomes another computation is said."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdisco import config
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.common.files import open_regular
from fastdisco.config import Config, Division, Moco, Seed, Swav
from fastdisco.models import Net, has_batch_norms, newest_first, perturbed
from fastdisco.run.checkpoint import world_of

# Of a checkpoint's meta: the division with which the run began.
NAME = "division"


class Followed(NamedTuple):
    """What a command trains with."""

    # With the data.accumulate and bn.groups of this number of ranks.
    cfg: Config
    # How the run began, and how it is now.
    began: Division
    now: Division
    # Whether a data.accumulate is given that is not the one that the run began with.
    asked: bool
    # What its checkpoints are to hold.
    meta: dict[str, str]


def agreed(cfg: Config, folder: Path, overwrite: bool) -> Followed:
    """How the run in the folder goes on, the same on every rank; called by each.

    overwrite: the run that is there is not gone on with.
    Raises UserError, see `followed`."""
    found = dist.alike(lambda: None if overwrite or dist.rank() else began(cfg, folder))
    text = dist.all_texts(json.dumps(found))[0]
    return followed(cfg, dist.world(), Division(*json.loads(text)) if text != "null" else None)


def followed(cfg: Config, world: int, began: Division | None) -> Followed:
    """How a run goes on with `world` ranks.

    began  None: it begins now
    A data.accumulate that is not the one that the run began with is taken as it is, and counts from
    then on.
    Raises UserError where the batch cannot be divided by the ranks."""
    if began is None:
        began = config.division(cfg, world)
    asked = cfg.data.accumulate != began.accumulate
    own = config.follow(cfg, world, began, asked or not cfg.data.accumulate_follows)
    now = config.division(own, world)
    # The group stays: it is as large as bn.groups asks for again once the images allow it.
    kept = now._replace(group=began.group) if asked else began
    return Followed(own, began, now, asked, {NAME: json.dumps(kept)})


def began(cfg: Config, folder: Path) -> Division | None:
    """How the run in the folder began; None where it has no checkpoint that can be read.

    Nothing is compared with the manifest: what is damaged here is refused where it is loaded."""
    for step in newest_first(folder)[0]:
        try:
            open_regular(step / "state.pt").close()
            # Maps the tensors, so that little is read.
            state = torch.load(step / "state.pt", "cpu", weights_only=True, mmap=True)
            return _of_state(cfg, step, state)
        # torch's readers raise all kinds of errors where the bytes make no sense.
        except Exception:
            continue
    return None


def told(found: Followed, nets: Iterable[Net]) -> Iterator[str]:
    """A sentence where the run goes on in another division than it began with: whether the losses
    stay the same, or what is another computation now.

    nets: the students'"""
    cfg, began, now = found.cfg, found.began, found.now
    if now == began:
        return
    nets = list(nets)
    norms = any(map(has_batch_norms, nets))
    differs = list(_differences(cfg, began, now, norms))
    drawn = any(map(perturbed, nets))
    draws = ["dropout and stochastic depth draw other numbers"] if drawn else []
    begin = f"the run began with {began} and goes on with {now}"
    if not differs:
        same = "the same computation, whose losses differ by rounding alone"
        yield f"{begin}: {'; '.join([same, *draws])}"
        return
    yield f"{begin}, which is another computation: {'; '.join([*differs, *draws])}"
    other = None if found.asked else _kept(cfg, began, now)
    if other and not list(_differences(cfg, began, other, norms)):
        yield (
            "data.accumulate_follows=false keeps the computation, if the memory suffices for "
            f"forwards of {other.images} images"
        )


def _of_state(cfg: Config, step: Path, state: dict[str, Any]) -> Division | None:
    """state: the content of its state.pt"""
    if NAME in state["meta"]:
        found = Division(*map(int, json.loads(state["meta"][NAME])))
        return found if min(found) > 0 else None
    # An older version's, with which the division changed with the number of ranks alone.
    world = world_of(step, state)
    try:
        return config.division(cfg, world) if world else None
    except UserError:
        return None


def _differences(cfg: Config, began: Division, now: Division, norms: bool) -> Iterator[str]:
    """Clauses: what is computed from other images together than when the run began.

    norms: whether the students have batch norms"""
    method, sync = cfg.method, norms and cfg.bn.sync
    over = f"{now.together} images instead of {began.together}"
    other = now.together != began.together
    if sync and other:
        yield f"batch norms take statistics over {over} (bn.sync)"
    if norms and not sync and now.group != began.group:
        yield f"batch norms take {now.group} images together instead of {began.group}"
    keys = isinstance(method, Moco | Seed) and method.contrast > 0 and cfg.bn.shuffle != "off"
    if keys and norms and not sync and other:
        # One part: nothing to permute (students.create).
        alone = now.together == now.group
        yield "keys are not permuted (bn.shuffle)" if alone else f"keys are permuted within {over}"
    if isinstance(method, Swav) and other:
        yield f"codes are balanced over {over}"
    rkd = isinstance(method, Moco) and (method.rkd.distance or method.rkd.angle)
    if rkd and now.images != began.images:
        yield f"relations (method.rkd) are among {now.images} images instead of {began.images}"
    if cfg.teacher and cfg.teacher.bn == "batch":
        here, there = (min(cfg.teacher.bn_group, x.images) for x in (now, began))
        if here != there:
            yield f"the teacher's batch norms take {here} images together instead of {there}"


def _kept(cfg: Config, began: Division, now: Division) -> Division | None:
    """The division with as many micro batches as when the run began; None where it is the one that
    is taken, or there is none."""
    if now.accumulate == began.accumulate:
        return None
    given = cfg.model_copy(
        update={"data": cfg.data.model_copy(update={"accumulate": began.accumulate})}
    )
    try:
        return config.division(config.follow(given, now.ranks, began, True), now.ranks)
    except UserError:
        return None
