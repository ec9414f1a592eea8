"""What follows from a configuration: each student's own, the crops one by one, the images of a
micro batch."""

from fastdisco.common.errors import UserError
from fastdisco.config.blocks import Config, student_names
from fastdisco.config.crops import Crop


def students(cfg: Config) -> dict[str, Config]:
    """The configuration that each student would have alone, by name; without `students` the one
    there is, named ''."""
    return {
        name: cfg.model_copy(
            update={
                "students": (),
                "student": cfg.student.model_copy(
                    update={
                        k: v
                        for k in ("arch", "hidden", "kwargs")
                        if (v := getattr(one, k)) is not None
                    }
                ),
                "optim": cfg.optim.model_copy(update={} if one.lr is None else {"lr": one.lr}),
            }
        )
        for name, one in zip(student_names(cfg), cfg.students)
    } or {"": cfg}


def crops(cfg: Config) -> tuple[Crop, ...]:
    """The crops of an image, one by one: each group of `views` laid over `view`, `count` times."""
    return tuple(
        cfg.view.model_copy(
            update={k: getattr(group, k) for k in group.model_fields_set - {"count"}}
        )
        for group in cfg.views
        for _ in range(group.count)
    )


def micro_batch(cfg: Config, world: int) -> int:
    """Images per rank and forward pass: the one place where the global batch is divided."""
    parts = world * cfg.data.accumulate
    batch, rest = divmod(cfg.data.batch, parts)
    if rest:
        near = [n for n in (batch * parts, (batch + 1) * parts) if n]
        raise UserError(
            f"data.batch: {cfg.data.batch} does not divide by {world} ranks x {cfg.data.accumulate} "
            f"accumulated; nearest: {' or '.join(map(str, near))}"
        )
    if batch % cfg.bn.groups:
        raise UserError(
            f"bn.groups: {cfg.bn.groups} does not divide the {batch} images of a rank's micro "
            f"batch; take a divisor of {batch}"
        )
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
