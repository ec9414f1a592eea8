"""The rows of bench/paper.py, from samples as bench/appendix/collect.py keeps them: linear gains in
points."""

import statistics

from harness import row

from appendix.plan import ALONE, EQUAL, FIGURES_STUDENT, TABLES

FIG2 = "fig2"


def summary(samples: dict) -> list[dict]:
    """A row for every bar; null, with what is missing, until every cell is measured."""
    found = []
    for table in sorted(TABLES):
        found.append(_smallest(f"paper_mini_{table}_gain_min", table_gains(samples, table), 0))
    for table in sorted(TABLES):
        name = f"paper_mini_{table}_teacher_margin_min"
        found.append(_smallest(name, margins(samples, table), 0))
    for share in ("1", "10"):
        gains = figure_gains(samples, "fig1", share)
        found.append(_smallest(f"paper_mini_fig1_gain_{share}pct", gains, 0))
    found.append(_smallest("paper_mini_fig2_gain", figure_gains(samples, FIG2, "linear"), 0))
    found.append(_smallest("paper_mini_equal_time_gain", equal_gains(samples), None))
    return [*found, _minutes(samples)]


def _minutes(samples: dict) -> dict:
    """CPU time of one seed's trainings, its teachers' and their recordings, without evaluations."""
    name, unit = "paper_mini_cpu_minutes", "CPU min of all trainings and recordings of one seed"
    spent = [x["cpu_minutes"] + x["recording"] for x in samples["teachers"].values()]
    for table, of in TABLES.items():
        for column in (ALONE, EQUAL, *dict.fromkeys(t for ts in of.teachers.values() for t in ts)):
            nets = of.equal if column == EQUAL else of.students
            nets = [n for n in nets if column in (ALONE, EQUAL, *of.teachers[n])]
            found = [_column(samples, table, net, column)[:1] for net in nets]
            if not all(found):
                return row(
                    name, None, unit, None, "lower", f"{column} of {table} is not trained yet"
                )
            firsts = [x for (x,) in found]
            # Students that see the same views share a recording.
            spent += [
                max((x["recording"] for x in firsts), default=0.0),
                *(x["cpu_minutes"] for x in firsts),
            ]
    return row(name, round(sum(spent), 1), unit, None, "lower")


# Cell -> points, or None where it is not measured.
Points = dict[str, float | None]


def table_gains(samples: dict, table: str) -> Points:
    """Of DisCo over the student alone, in every cell of the table."""
    return {
        f"{net} from {t}": gain(
            _column(samples, table, net, t), _column(samples, table, net, ALONE)
        )
        for net, names in TABLES[table].teachers.items()
        for t in names
    }


def equal_gains(samples: dict) -> Points:
    """Of DisCo from the first teacher over the student alone for as much CPU time."""
    out: Points = {}
    for table, of in TABLES.items():
        for net in of.equal:
            first = of.teachers[net][0]
            pair = (_column(samples, table, net, c) for c in (first, EQUAL))
            out[f"{net} from {first}"] = gain(*pair)
    return out


def margins(samples: dict, table: str) -> Points:
    """How far each teacher is above each of its students alone, mean over seeds."""
    out: Points = {}
    for net, names in TABLES[table].teachers.items():
        alone = _column(samples, table, net, ALONE)
        for t in names:
            of = samples["teachers"].get(t)
            both = of and alone
            mean = statistics.mean(s["linear"] for s in alone) if alone else 0.0
            out[f"{t} above {net}"] = 100 * (of["linear"] - mean) if both else None
    return out


def figure_gains(samples: dict, figure: str, key: str) -> Points:
    """Of DisCo over the student alone, for every teacher; key: of a sample's accuracy."""
    columns = samples["figures"].get(figure, {})
    alone = columns.get(ALONE, [])
    names = TABLES["table2"].teachers[FIGURES_STUDENT]
    return {f"from {t}": gain(columns.get(t, []), alone, key) for t in names}


def gain(ours: list[dict], base: list[dict], key: str = "linear") -> float | None:
    """Points by which the first is better, the mean over the seeds that both have; None: no seed."""
    at = {s["seed"]: s for s in base}
    pairs = [s[key] - at[s["seed"]][key] for s in ours if s["seed"] in at]
    return 100 * statistics.mean(pairs) if pairs else None


def _column(samples: dict, table: str, net: str, column: str) -> list[dict]:
    return samples["tables"].get(table, {}).get(net, {}).get(column, [])


def _smallest(name: str, points: Points, aim: float | None) -> dict:
    unit = "points of linear top-1, the smallest of the cells, mean over seeds"
    missing = [cell for cell, x in points.items() if x is None]
    if missing:
        some = f"{len(missing)} of {len(points)} cells are not trained yet: {', '.join(missing)}"
        why = some if len(missing) < len(points) else "none of its cells is trained yet"
        return row(name, None, unit, aim, "higher", why)
    value = min(x for x in points.values() if x is not None)
    return row(name, round(value, 2), unit, aim, "higher")


def mean(samples: list[dict], key: str) -> float | None:
    """Of a sample's number over seeds; None where there is none."""
    return statistics.mean(s[key] for s in samples) if samples else None
