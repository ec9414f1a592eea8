"""What follows from a configuration: each student's own one, the crops one by one, the images of a
micro batch, and the least memory that a rank needs for each size."""

import math
from typing import Any

from fastdisco.common.errors import UserError
from fastdisco.config.blocks import OneOfMany
from fastdisco.config.config import Config, student_names
from fastdisco.config.crops import Crop


def students(cfg: Config) -> dict[str, Config]:
    """By name, the configuration with which each of `students` would be trained alone.

    Without `students` there is one, named ''."""
    names = student_names(cfg)
    return {name: _alone(cfg, one) for name, one in zip(names, cfg.students)} or {"": cfg}


def _alone(cfg: Config, one: OneOfMany) -> Config:
    asked: dict[str, Any] = {"arch": one.arch, "hidden": one.hidden, "kwargs": one.kwargs}
    given = {key: value for key, value in asked.items() if value is not None}
    rate = {} if one.lr is None else {"lr": one.lr}
    return cfg.model_copy(
        update={
            "students": (),
            "student": cfg.student.model_copy(update=given),
            "optim": cfg.optim.model_copy(update=rate),
        }
    )


def crops(cfg: Config) -> tuple[Crop, ...]:
    """The crops of an image one by one: each group of `views` laid over `view`, `count` times."""
    found: list[Crop] = []
    for group in cfg.views:
        given = {key: getattr(group, key) for key in group.model_fields_set - {"count"}}
        found += [cfg.view.model_copy(update=given)] * group.count
    return tuple(found)


def micro_batch(cfg: Config, world: int) -> int:
    """Images per rank and forward pass: the one place where the global batch is divided.

    world  number of ranks.
    Raises UserError where `data.batch`, `bn.groups` or `teacher.bn_group` do not divide, or leave a
    batch norm with one image."""
    batch = _divided(cfg, world)
    if batch % cfg.bn.groups:
        raise UserError(
            f"bn.groups: {cfg.bn.groups} does not divide the {batch} images of a rank's micro "
            f"batch; take a divisor of {batch}"
        )
    # A group larger than the micro batch is the micro batch.
    if cfg.teacher and cfg.teacher.bn == "batch" and batch % min(cfg.teacher.bn_group, batch):
        raise UserError(
            f"teacher.bn_group: {cfg.teacher.bn_group} does not divide the {batch} images of a "
            f"rank's micro batch; take a divisor of {batch}"
        )
    if batch // cfg.bn.groups < 2:
        raise UserError(
            "data.batch: batch norm sees 1 image in each group and needs 2; enlarge data.batch or "
            "lower bn.groups"
        )
    return batch


def _divided(cfg: Config, world: int) -> int:
    parts = world * cfg.data.accumulate
    batch, rest = divmod(cfg.data.batch, parts)
    if rest:
        near = [n for n in (batch * parts, (batch + 1) * parts) if n]
        others = f"; or start {ranks(others, world)}" if (others := _worlds(cfg)) else ""
        raise UserError(
            f"data.batch: {cfg.data.batch} does not divide by {world} ranks x "
            f"{cfg.data.accumulate} accumulated; nearest: {' or '.join(map(str, near))}{others}"
        )
    return batch


def _worlds(cfg: Config) -> list[int]:
    """The numbers of ranks that the batch can be divided by."""
    share, rest = divmod(cfg.data.batch, cfg.data.accumulate)
    return [] if rest else [n for n in divisors(share) if _works(cfg, n)]


def _works(cfg: Config, world: int) -> bool:
    try:
        micro_batch(cfg, world)
    except UserError:
        return False
    return True


def divisors(n: int) -> list[int]:
    """In ascending order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def ranks(numbers: list[int], near: int) -> str:
    """Numbers of ranks in words, the eight that are nearest to `near`."""
    some = sorted(sorted(numbers, key=lambda n: abs(n - near))[:8])
    *first, last = map(str, some)
    return f"{', '.join(first)} or {last} ranks" if first else f"{last} rank{'s' * (last != '1')}"


def refuse_beyond(cfg: Config, world: int, memory: int) -> None:
    """Raises UserError, which names the key, where one size alone needs more than a device's memory.

    world   number of ranks
    memory  bytes"""
    for key, size in _sizes(cfg, world).items():
        if size > memory:
            raise UserError(
                f"{key}: needs {size / 2**30:,.0f} GiB at least on each rank, and its device has "
                f"{memory / 2**30:,.0f}; lower it"
            )


def _sizes(cfg: Config, world: int) -> dict[str, int]:
    """By key, bytes that each rank holds at least because of it."""
    asked = crops(cfg)
    images = cfg.data.batch // (world * cfg.data.accumulate)
    # Half precision is the least that views come in.
    views = sum(2 * 3 * crop.size**2 for crop in asked)
    own = "view.size" if cfg.view.size == max(crop.size for crop in asked) else "views"
    sizes = {
        own: views,
        "data.batch": images * views,
        "data.prefetch": images * views * cfg.data.prefetch,
        "data.eval_size": 4 * 3 * cfg.data.eval_size**2,
        "data.eval_batch": 4 * 3 * cfg.data.eval_size**2 * cfg.data.eval_batch,
        "student.dim": 4 * cfg.student.dim,
    }
    # ZeRO parts weights among the ranks, but not while they are made.
    hidden = max(student.student.hidden for student in students(cfg).values())
    sizes["student.hidden"] = 4 * hidden * cfg.student.dim
    dim, method = cfg.student.dim, cfg.method
    if queue := getattr(method, "queue", 0):
        sizes["method.queue"] = 2 * queue * dim
    if prototypes := getattr(method, "prototypes", 0):
        sizes["method.prototypes"] = 4 * prototypes * dim
    return sizes
