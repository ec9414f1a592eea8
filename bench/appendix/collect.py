"""Carries out tables and figures arm by arm, and keeps what is finished as samples."""

from collections.abc import Callable
from typing import NamedTuple

from appendix import scores, training
from appendix.arms import Arm, teacher
from appendix.plan import ALONE, TABLES, cells, equal, of_figures, of_maps
from appendix.processes import Failed, Stopped
from appendix.settings import Size
from appendix.training import Lab


class Samples(NamedTuple):
    """What is finished, and why the rest is not.

    tables    table -> student -> column -> scores, one for each seed
    teachers  teacher -> scores
    figures   figure -> column -> scores, one for each seed; of figure 3 network -> its map
    missing   name of an arm or of a figure -> why"""

    tables: dict[str, dict[str, dict[str, list[dict]]]]
    teachers: dict[str, dict]
    figures: dict[str, dict]
    missing: dict[str, str]


def carried_out(
    lab: Lab, size: Size, seeds: list[int], only: list[str], other: list[str]
) -> Samples:
    """Everything that is asked for: the first seed of all, then the next.

    other  overrides that name figure 2's data set
    What the time does not allow, or what failed, is in `missing`; the rest goes on."""
    found = Samples({}, {}, {}, {})
    for seed in seeds:
        for name in only:
            if name in TABLES:
                _table(lab, size, name, seed, found)
            elif name == "fig3":
                _maps(lab, size, seed, found)
            else:
                _figure(lab, size, name, seed, other, found)
    return found


def _table(lab: Lab, size: Size, table: str, seed: int, found: Samples) -> None:
    """Every arm trained and scored, after its teacher."""
    rows = found.tables.setdefault(table, {})
    for cell in cells(table, seed, size):
        if cell.arm.teacher and cell.column not in found.teachers:
            of = teacher(cell.column, size)
            _kept(
                found, of.name, lambda of=of: _scored(lab, of, size, 0), found.teachers, cell.column
            )
        here = rows.setdefault(cell.student, {})
        _appended(
            found,
            cell.arm.name,
            lambda arm=cell.arm: _scored(lab, arm, size, seed),
            here,
            cell.column,
        )
    for net in TABLES[table].equal:
        here = rows.get(net, {})
        first = TABLES[table].teachers[net][0]
        both = [_of_seed(here.get(column, []), seed) for column in (ALONE, first)]
        if all(both):
            cell = equal(table, net, seed, size, *both)
            todo = lambda arm=cell.arm: _scored(lab, arm, size, seed)
            _appended(found, cell.arm.name, todo, here, cell.column)


def _figure(lab: Lab, size: Size, figure: str, seed: int, other: list[str], found: Samples) -> None:
    columns = found.figures.setdefault(figure, {})
    for cell in of_figures(seed, size):

        def todo(arm: Arm = cell.arm) -> dict:
            training.train(lab, arm)
            if figure == "fig1":
                return scores.semi(lab, arm, size) | dict(seed=seed)
            return scores.transfer(lab, arm, size, other) | dict(seed=seed)

        _appended(found, f"{figure} of {cell.arm.name}", todo, columns, cell.column)


def _maps(lab: Lab, size: Size, seed: int, found: Samples) -> None:
    """One seed's maps are enough to look at: the first that is finished."""
    if found.figures.get("fig3"):
        return
    arms = of_maps(seed, size)

    def todo() -> dict:
        for arm in arms.values():
            training.train(lab, arm)
        return scores.maps(lab, arms, size)

    _kept(found, f"fig3 of seed {seed}", todo, found.figures, "fig3")


def _scored(lab: Lab, arm: Arm, size: Size, seed: int) -> dict:
    length = training.train(lab, arm)
    return length | scores.tabled(lab, arm, size) | dict(seed=seed, run=arm.name)


def _appended(
    found: Samples, name: str, todo: Callable[[], dict], where: dict[str, list[dict]], key: str
) -> None:
    one: dict[str, dict] = {}
    _kept(found, name, todo, one, key)
    where.setdefault(key, []).extend(one.values())


def _kept(
    found: Samples, name: str, todo: Callable[[], dict], where: dict[str, dict], key: str
) -> None:
    """Puts what is done into its place, or why it could not be done into `missing`."""
    try:
        where[key] = todo()
    except (Stopped, Failed) as e:
        found.missing[name] = str(e)
        if isinstance(e, Failed):
            print(e, flush=True)


def _of_seed(samples: list[dict], seed: int) -> dict | None:
    return next((s for s in samples if s["seed"] == seed), None)
