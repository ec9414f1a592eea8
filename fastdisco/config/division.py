"""How the images of a step are divided among ranks, micro batches and batch norms, and how that
follows the number of ranks when a run goes on with another one (docs/runs.md)."""

from collections.abc import Iterator
from typing import NamedTuple

from fastdisco.common.errors import UserError
from fastdisco.config.config import Config
from fastdisco.config.derived import divisors, micro_batch, ranks


class Division(NamedTuple):
    """Of the images of an optimizer step: ranks x images x accumulate."""

    ranks: int
    # Images of a rank in one forward, the micro batch.
    images: int
    # Micro batches in a step.
    accumulate: int
    # Images of a rank that a batch norm takes together where bn.sync is off.
    group: int

    @property
    def together(self) -> int:
        """Images of a micro batch over all ranks."""
        return self.ranks * self.images

    def __str__(self) -> str:
        return f"{self.ranks} ranks x {self.images} images x {self.accumulate} accumulated"


def division(cfg: Config, world: int) -> Division:
    """As the configuration says it, for `world` ranks.  Raises UserError, see `micro_batch`."""
    images = micro_batch(cfg, world)
    return Division(world, images, cfg.data.accumulate, images // cfg.bn.groups)


def follow(cfg: Config, world: int, began: Division, kept: bool) -> Config:
    """The configuration with the `data.accumulate` and `bn.groups` with which a run goes on with
    `world` ranks.

    began  how the run began
    kept   whether data.accumulate stays as it is; else a rank's forward gets no more images than it
           had when the run began, if the batch can be divided so
    Batch norms take as many images together as when the run began, or as few less as can be.
    Raises UserError, which says how many ranks can go on, where the batch cannot be divided."""
    found = list(_ways(cfg, world, began.group, kept))
    if not found and kept:
        micro_batch(cfg, world)
    if not found:
        others = [n for n in divisors(cfg.data.batch) if any(_ways(cfg, n, began.group))]
        raise UserError(
            f"data.batch: the run's {cfg.data.batch} images a step do not divide by {world} ranks "
            f"with 2 images or more in each forward; go on with {ranks(others, world)}"
        )

    def wanted(way: Config) -> tuple[bool, bool, int]:
        images = micro_batch(way, world)
        fits = images <= began.images
        # Of those that are larger, the smallest.
        return fits, images % began.group == 0, images if fits else -images

    return max(found, key=wanted)


def can_follow(cfg: Config, world: int) -> bool:
    """Whether a run that began with any number of ranks can go on with `world`."""
    kept = not cfg.data.accumulate_follows
    return any(_ways(cfg, world, cfg.data.batch, kept))


def _ways(cfg: Config, world: int, group: int, kept: bool = False) -> Iterator[Config]:
    """The configuration with each `data.accumulate` that divides the batch, and the `bn.groups`
    that take at most `group` images together, or as few more as can be."""
    if cfg.data.batch % world:
        return
    accumulates = [cfg.data.accumulate] if kept else divisors(cfg.data.batch // world)
    for accumulate in accumulates:
        images, rest = divmod(cfg.data.batch, world * accumulate)
        if rest or images < 2:
            continue
        sizes = divisors(images)[1:]
        size = max((n for n in sizes if n <= group), default=sizes[0])
        # Statistics over all ranks are of whole micro batches.
        groups = 1 if cfg.bn.sync else images // size
        way = cfg.model_copy(
            update={
                "data": cfg.data.model_copy(update={"accumulate": accumulate}),
                "bn": cfg.bn.model_copy(update={"groups": groups}),
            }
        )
        try:
            micro_batch(way, world)
        # teacher.bn_group does not divide.
        except UserError:
            continue
        yield way
