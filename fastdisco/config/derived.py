"""What follows from a configuration: each student's own one, the crops one by one, and the images
of a micro batch."""

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
        raise UserError(
            f"data.batch: {cfg.data.batch} does not divide by {world} ranks x "
            f"{cfg.data.accumulate} accumulated; nearest: {' or '.join(map(str, near))}"
        )
    return batch
