"""The page: what was collected, through the templates, into one file without a request."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastdisco import __version__
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.common.urls import Url
from fastdisco.data.source import read_quarantine
from fastdisco.report import curves, differences, evaluations, maps, neighbours, networks, pareto
from fastdisco.report import tiles as sheets
from fastdisco.report import views as augmented
from fastdisco.report.collect import FORMS, Run

# In the first bytes of each page of ours.
MARK = '<meta name="generator" content="fastdisco report">'


TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Wanted:
    step: int | None = None  # whose views are drawn; None: the last that was logged
    images: int = 50  # of each class, among which neighbours are looked for; 0: none
    refresh: float | None = None  # seconds after which a browser reads the file anew


def write(
    out: Path, runs: Sequence[Run], wanted: Wanted, kept: neighbours.Kept | None = None
) -> None:
    """Writes the page of these runs; the same runs give the same bytes.

    kept: what is not computed again for the next page
    Raises UserError where `out` is something else than a page of ours, or cannot be written."""
    refuse(out)
    text = html(runs, wanted, kept or neighbours.Kept())
    try:
        # Whatever the locale: a page in ASCII is read alike by all.
        write_whole(out, text.encode("ascii", "xmlcharrefreplace").decode())
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror}); give another --out") from None


def refuse(out: Path) -> None:
    """Raises UserError for a file that is no report, which would be lost, and for a folder that is
    not there."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        why = "is a folder" if out.is_dir() else "its folder is not there"
        raise UserError(f"{out}: {why}; give --out a file in a folder that is there")
    if out.exists() and out.stat().st_size:
        with out.open("rb") as f:
            if MARK.encode() not in f.read(1000):
                raise UserError(f"{out}: is no report, so it is left as it is; give another --out")


def html(runs: Sequence[Run], wanted: Wanted, kept: neighbours.Kept) -> str:
    """The whole page."""
    sheet = sheets.Sheet()
    nets = networks.read(runs, weights=wanted.images > 0)
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["json"] = _json
    shown = maps.read(runs, sheet)
    strips = neighbours.strips(runs, nets, wanted.images, sheet, kept)
    return env.get_template("page.html.j2").render(
        mark=Markup(MARK),
        file=_file,
        version=__version__,
        refresh=wanted.refresh,
        runs=runs,
        best=[curves.best(run) for run in runs],
        networks=nets,
        groups=pareto.groups(runs, nets),
        forms=FORMS,
        place=pareto,
        steps=curves.over_steps(runs),
        times=curves.over_time(runs),
        unit=curves.unit(runs)[0],
        configurations=differences.configurations(runs),
        environments=differences.environments(runs),
        left_out=[_left_out(run) for run in runs],
        maps=shown,
        side=maps.SIDE,
        strips=strips,
        views=augmented.draw(runs, wanted.step),
        evaluations=evaluations.table(nets),
        evaluated=evaluations.times(nets),
        evaluations_json=evaluations.json(nets),
        sheet=sheet,
        tiles=sheets,
    )


def _file(name: str) -> Markup:
    """A style, a script or a licence as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _json(value: Any) -> Markup:
    """For a script element, which the text cannot end."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _left_out(run: Run) -> str:
    """A sentence on the images that the run does without: its quarantine, and what broke."""
    broken = len(networks.aside(run))
    said = f"; {broken} more broke during the training" if broken else ", and none broke"
    path = run.cfg.data.quarantine
    if path is None:
        return f"It has no quarantine (data.quarantine: null){said}."
    if isinstance(run.cfg.data.train, Url):
        return f"Its images are in object storage, whose quarantine is not looked at here{said}."
    train = run.at(run.cfg.data.train)
    whole = path if path.is_absolute() else (train if train.is_dir() else train.parent) / path
    if not whole.parent.exists():
        return f"Its images, and with them its quarantine, are not here{said}."
    if not whole.exists():
        return f"No image is quarantined{said}."
    try:
        found = len(read_quarantine(whole))
    except UserError as e:
        return f"Its quarantine cannot be read ({e}){said}."
    return f"{found} images are quarantined{said}."
