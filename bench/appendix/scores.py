"""What a finished arm scores on the test split, by `fastdisco eval`."""

import json
import sys
from pathlib import Path

from appendix.arms import Arm, digest
from appendix.processes import Failed, written
from appendix.settings import Size
from appendix.training import Lab

# Of `fastdisco eval`'s values, what the tables show.
KNN, LINEAR = "eval/knn_top1", "eval/logistic_top1_selected"
SELECTED = "linear_top1_selected"
COORDINATES = "*.coordinates.json"


def tabled(lab: Lab, arm: Arm, size: Size) -> dict[str, float]:
    """knn and linear accuracy, 0 to 1."""
    found = evaluated(lab, arm, "all", (KNN, LINEAR), size.scored, "--only", "knn,probe")
    return dict(knn=found[KNN], linear=found[LINEAR])


def semi(lab: Lab, arm: Arm, size: Size) -> dict[str, float]:
    """Share of labels in per cent -> linear accuracy, 0 to 1, the mean over draws."""
    return {
        share: _selected(evaluated(lab, arm, "semi", (), settings))
        for share, settings in size.semi.items()
    }


def transfer(lab: Lab, arm: Arm, size: Size, images: list[str]) -> dict[str, float]:
    """Linear accuracy, 0 to 1, on another data set.  images: overrides that name it."""
    found = evaluated(lab, arm, "transfer", (), [*size.transferred, *images])
    return dict(linear=_selected(found))


def maps(lab: Lab, arms: dict[str, Arm], size: Size) -> dict[str, dict]:
    """Figure 3: title -> points [[x, y]] of the test images, their colours, and how well the map
    keeps neighbours.  The networks stand side by side on the same images."""
    runs, out = [str(run(lab, arm)) for arm in arms.values()], lab.state / "maps"
    place = out / digest([[arm.name for arm in arms.values()], size.mapped])
    if not any(place.rglob(COORDINATES)):
        line = [sys.executable, "-m", "fastdisco.cli", "eval", "tsne", *runs]
        titles = f"tsne.titles={json.dumps(list(arms))}"
        lab.processes.run("fig3", [*line, "--out", str(place), titles, *size.mapped])
    found = json.loads(next(iter(sorted(place.rglob(COORDINATES)))).read_text())
    colours = {c["label"]: c["colour"] for c in found["classes"]}
    shown = [colours[image["label"]] for image in found["images"]]
    return {
        of["name"]: dict(coordinates=of["coordinates"], values=of["values"], colours=shown)
        for of in found["networks"]
    }


def evaluated(
    lab: Lab, arm: Arm, what: str, needs: tuple[str, ...], settings: list[str], *options: str
) -> dict:
    """All values of one call of `fastdisco eval`; what is there is not evaluated again.

    needs  values that `eval all` would leave out where it cannot have them; then raises Failed"""
    name = f"{arm.name}-{what}-{digest([settings, options])}"
    kept = lab.state / f"scores/{name}.json"
    if not kept.exists():
        # DINO's authors publish the mean student (EMA), and it is what a DINO teacher teaches.
        net = "ema" if arm.cfg["method"]["name"] == "dino" else "student"
        line = [sys.executable, "-m", "fastdisco.cli", "eval", what, str(run(lab, arm))]
        printed = lab.processes.run(name, [*line, "--net", net, *options, *settings])
        values = json.loads(printed.splitlines()[-1])
        if lacking := [k for k in needs if k not in values]:
            log = lab.state / f"logs/{name}.log"
            raise Failed(f"{name} has no {' and '.join(lacking)}; {log} says why")
        written(kept, values)
    return json.loads(kept.read_text())


def run(lab: Lab, arm: Arm) -> Path:
    return lab.state / "runs" / arm.name


def _selected(found: dict[str, float]) -> float:
    """The accuracy of the setting that was chosen on training images; of several draws, their mean."""
    names = [k for k in found if k.endswith(f"{SELECTED}_mean")]
    names = names or [k for k in found if k.endswith(SELECTED)]
    assert len(names) == 1, sorted(found)
    return found[names[0]]
