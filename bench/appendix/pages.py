"""The tables of docs/miniature.md beside the paper's numbers, as {columns, rows, note} of texts."""

from appendix.plan import ALONE, EQUAL, FIGURES_STUDENT, TABLES
from appendix.rows import figure_gains, gain, mean
from appendix.settings import NETS, PAPER, TEACHERS

OPEN = "not measured yet"
# A column of a table, as a reader sees it called.
TITLES = {
    ALONE: "alone",
    EQUAL: "alone, for DisCo's time",
    "moco": "DisCo, teacher by MoCo-v2",
    "swav": "DisCo, teacher by SwAV",
    "seed": "DisCo, teacher by SEED",
    "dino_vit": "DisCo, larger ViT by DINO",
    "dino_xcit": "DisCo, larger XCiT by DINO",
}


def tables(samples: dict) -> dict[str, dict]:
    made = {name: table(samples, name) for name in sorted(TABLES)}
    figures = {name: figure(samples, name) for name in ("fig1", "fig2")}
    return {"teachers": teachers(samples)} | made | figures | {"fig3": maps(samples)}


def table(samples: dict, name: str) -> dict:
    """A line for every student in every column."""
    columns = ["student", "", "seeds", "epochs", "linear, %", "gain", "kNN, %", "gain", "CPU min"]
    rows = []
    for net in TABLES[name].students:
        here = samples["tables"].get(name, {}).get(net, {})
        extra = [EQUAL] if net in TABLES[name].equal else []
        for column in (ALONE, *extra, *TABLES[name].teachers[net]):
            found, alone = here.get(column, []), here.get(ALONE, [])
            rows.append(
                [net, TITLES[column], *_cells(found, alone, column), _paper(name, net, column)]
            )
    return dict(columns=[*columns, "the paper's linear"], rows=rows)


def teachers(samples: dict) -> dict:
    columns = ["teacher", "network", "epochs", "linear, %", "kNN, %", "CPU min"]
    rows = []
    for name, how in TEACHERS.items():
        found = samples["teachers"].get(name)
        cells = (
            [f"{found['epochs']}", _percent(found["linear"]), _percent(found["knn"]), _time(found)]
            if found
            else [OPEN, "", "", ""]
        )
        rows.append([name, f"`{NETS[how.net]['arch']}`, {how.net}", *cells])
    return dict(columns=columns, rows=rows)


def figure(samples: dict, name: str) -> dict:
    """Accuracies of figure 1 or 2, a line for every column, and the gains."""
    keys = {"fig1": ("1", "10"), "fig2": ("linear",)}[name]
    what = {"1": "1 % of the labels, %", "10": "10 % of the labels, %", "linear": "linear, %"}
    found = samples["figures"].get(name, {})
    rows = []
    for column in (ALONE, *TABLES["table2"].teachers[FIGURES_STUDENT]):
        cells = []
        for key in keys:
            points = figure_gains(samples, name, key).get(f"from {column}")
            cells += [_percent(mean(found.get(column, []), key)), _signed(points)]
        rows.append([FIGURES_STUDENT, TITLES[column], *cells])
    return dict(columns=["student", "", *(c for k in keys for c in (what[k], "gain"))], rows=rows)


def maps(samples: dict) -> dict:
    """How well each map of figure 3 keeps neighbours."""
    found = samples["figures"].get("fig3", {})
    rows = [[title, *(f"{x:.3f}" for x in of["values"].values())] for title, of in found.items()]
    first = next(iter(found.values()))["values"] if found else {}
    names = [name.removeprefix("tsne_").replace("_", " ") for name in first]
    return dict(columns=["network", *names], rows=rows or [[OPEN]])


def _cells(found: list[dict], alone: list[dict], column: str) -> list[str]:
    """Seeds, epochs, linear with gain, kNN with gain, CPU minutes."""
    if not found:
        return [OPEN, *[""] * 6]
    gains = ["", ""]
    if column != ALONE:
        gains = [_signed(gain(found, alone, key)) for key in ("linear", "knn")]
    linear, knn = (_percent(mean(found, key)) for key in ("linear", "knn"))
    time = f"{mean(found, 'cpu_minutes'):.1f}"
    if recording := mean(found, "recording"):
        time += f" + {recording:.1f}"
    epochs = f"{mean(found, 'epochs'):g}"
    return [f"{len(found)}", epochs, linear, gains[0], knn, gains[1], time]


def _paper(table: str, net: str, column: str) -> str:
    """The paper's number, with its gain."""
    who, alone, taught = PAPER[table][net]
    if column == ALONE:
        return f"{who}: {alone}"
    if column not in taught:
        return ""
    return f"{taught[column]} ({_signed(taught[column] - alone)})"


def _percent(share: float | None) -> str:
    return OPEN if share is None else f"{100 * share:.1f}"


def _signed(points: float | None) -> str:
    return "" if points is None else f"{points:+.1f}"


def _time(found: dict) -> str:
    return f"{found['cpu_minutes']:.1f}"
