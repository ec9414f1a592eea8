"""The pictures of bench/paper.py: one for each table and figure that has samples."""

import statistics

from appendix.pages import TITLES
from appendix.plan import ALONE, FIGURES_STUDENT, TABLES
from harness.pictures import figure

COLOURS = {ALONE: "tab:gray"}
NAMES = {
    "table1": "Table 1 in miniature: the SwAV testbed",
    "table2": "Table 2 in miniature: the MoCo-v2 testbed",
    "table3": "Table 3 in miniature: the DINO testbed",
    "fig1": "Figure 1 in miniature: linear on part of the labels",
    "fig2": "Figure 2 in miniature: linear on another data set",
    "fig3": "Figure 3 in miniature: t-SNE of the test images, one colour a class",
}


def drawings(result: dict) -> dict:
    """Name -> matplotlib figure."""
    samples = result["samples"]
    found = {t: table(samples, t) for t in sorted(TABLES) if _any(samples["tables"].get(t, {}))}
    for name in ("fig1", "fig2"):
        if any(samples["figures"].get(name, {}).values()):
            found[name] = part(samples, name)
    if maps := samples["figures"].get("fig3"):
        found["fig3"] = scattered(maps)
    return found


def table(samples: dict, name: str):
    """A panel for each student: linear accuracy of every column, a dot a seed, the teachers'
    dashed."""
    of = TABLES[name]
    made, axes = figure(1, len(of.students), 11, 3.4, sharey=False)
    for axis, net in zip(axes[0], of.students):
        columns = samples["tables"][name].get(net, {})
        order = [c for c in TITLES if columns.get(c)]
        for y, column in enumerate(order):
            _bar(axis, y, [100 * s["linear"] for s in columns[column]], column)
            if teacher := samples["teachers"].get(column):
                x = 100 * teacher["linear"]
                axis.plot([x, x], [y - 0.4, y + 0.4], "r--")
        _labelled(axis, order, f"{net}: linear top-1, % of the test split")
    _legend(made, axes[0, 0], "the teacher")
    made.suptitle(NAMES[name])
    return made


def part(samples: dict, name: str):
    """Figures 1 and 2: a panel for each share of the labels, or one for the other data set."""
    keys = {"fig1": {"1": "1 % of the labels", "10": "10 % of the labels"}}.get(
        name, {"linear": "all labels of the other set"}
    )
    columns = samples["figures"][name]
    made, axes = figure(1, len(keys), 5.5 * len(keys), 3.0)
    order = [c for c in TITLES if columns.get(c)]
    for axis, (key, title) in zip(axes[0], keys.items()):
        for y, column in enumerate(order):
            _bar(axis, y, [100 * s[key] for s in columns[column]], column)
        _labelled(axis, order, f"{FIGURES_STUDENT}, {title}: top-1, %")
    _legend(made, axes[0, 0])
    made.suptitle(NAMES[name])
    return made


def scattered(maps: dict):
    """A map for each network."""
    made, axes = figure(1, len(maps), 5 * len(maps), 5.2)
    for axis, (title, of) in zip(axes[0], maps.items()):
        x, y = zip(*of["coordinates"])
        axis.scatter(x, y, c=of["colours"], s=8)
        axis.set(title=title, xticks=[], yticks=[])
    made.suptitle(NAMES["fig3"])
    return made


def _bar(axis, y: int, values: list[float], column: str) -> None:
    axis.barh(y, statistics.mean(values), color=COLOURS.get(column, "tab:blue"), alpha=0.7)
    axis.plot(values, [y] * len(values), "k.", markersize=5)


def _labelled(axis, order: list[str], title: str) -> None:
    axis.set(title=title, yticks=range(len(order)), yticklabels=[TITLES[c] for c in order])
    axis.title.set_fontsize(10)
    axis.invert_yaxis()


def _legend(made, axis, dashed: str = "") -> None:
    axis.plot([], [], "k.", label="a seed")
    if dashed:
        axis.plot([], [], "r--", label=dashed)
    made.legend(loc="outside lower center", ncols=2, fontsize=9)


def _any(students: dict) -> bool:
    return any(samples for columns in students.values() for samples in columns.values())
