"""The augmented views as step n of a run saw them.  They are hashed from (seed, epoch, image, view), so
the run's own loader draws them again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fastdisco import config, data, teacher
from fastdisco.common.errors import UserError
from fastdisco.config import Config, Crop
from fastdisco.data import Batch, Listing, TrainLoader
from fastdisco.report import networks, tiles
from fastdisco.report.collect import Run

# Images of a step that are shown, and the side of a picture in the sheet.
IMAGES, SIDE, GAP = 4, 84, 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Views:
    run: str
    text: str  # what the picture shows, or why there is none
    uri: str = ""
    width: int = 0
    height: int = 0
    images: list[str] = field(default_factory=list)  # names, in rows

    def json(self) -> dict[str, Any]:
        return {"run": self.run, "text": self.text, "images": self.images}


class Seen(NamedTuple):
    epoch: int  # from 0
    batch: Batch
    crops: tuple[Crop, ...]  # one for each view


def draw(runs: Sequence[Run], step: int | None = None) -> list[Views]:
    """A picture for each run: in a row the original and its views.

    step: from 1; None: the last that was logged"""
    found: list[Views] = []
    known: dict[str, str] = {}
    for run in runs:
        n = step or run.step or 1
        if n > (run.steps or n):
            text = f"has no step {n}: it ends after {run.steps}."
            found.append(Views(run.name, text))
            continue
        try:
            one, recipe = _of_run(run, n)
        except (UserError, OSError, RuntimeError) as e:
            found.append(Views(run.name, f"its views cannot be drawn: {e}"))
            continue
        if recipe in known:
            one = Views(run.name, f"saw the same images with the same views as {known[recipe]}.")
        else:
            known[recipe] = run.name
        found.append(one)
    return found


def of_step(
    cfg: Config, listing: Listing, step: int, images: int, aside: Mapping[int, str] | None = None
) -> Seen:
    """The first images of step `step` (from 1), over all ranks and micro batches, with the views that
    they had.

    aside: what had broken by then, in whose places others came"""
    crops = config.crops(cfg)
    # A loader in one process takes the whole step as one batch; the views do not depend on it.
    on_cpu = cfg.data.model_copy(update={"decode": "auto", "augment": "auto"})
    loader = TrainLoader(
        listing,
        crops,
        cfg.data.batch,
        cfg.run.seed,
        cfg.run.epochs,
        1,
        cfg.data.threads,
        CPU,
        placement=data.place(on_cpu, CPU),
        rounds=teacher.rounds(cfg.teacher),
    )
    loader.state = {"position": 0, "aside": dict(aside or {})}
    epoch = (step - 1) // loader.steps_per_epoch
    indices = loader.images_of(step - 1)[:images]
    (batch,) = loader.views_of(indices, epoch)
    # The epoch of its order; with recorded embeddings its views are those of an earlier one.
    return Seen(epoch, batch, crops)


def _of_run(run: Run, step: int) -> tuple[Views, str]:
    """The views, and what decides them: two runs of one recipe have the same."""
    cfg = run.cfg
    listing = data.listing(run.at(cfg.data.train), cfg.data.quarantine, images=cfg.data)
    epoch, batch, crops = of_step(cfg, listing, step, IMAGES, networks.aside(run))
    sheet = _sheet(listing, batch, crops)
    text = (
        f"step {step}, in epoch {epoch + 1}: {len(batch.index)} of its {cfg.data.batch} images, with "
        f"the original at the left and {len(crops)} views."
    )
    if run.env.get("gpus"):
        text += " The run drew them on a GPU, whose decoder may differ in the last bit."
    recipe = f"{listing.fingerprint} {batch.index.tolist()} {batch.epoch} {cfg.run.seed} {crops}"
    names = [listing.files[i] for i in batch.index.tolist()]
    return Views(run.name, text, tiles.uri(sheet, 85), *sheet.size, names), recipe


def _sheet(listing: Listing, batch: Batch, crops: Sequence[Crop]) -> Image.Image:
    rows, columns = len(batch.index), len(crops) + 1
    sheet = Image.new("RGB", (columns * (SIDE + GAP) - GAP, rows * (SIDE + GAP) - GAP), "white")
    for i, index in enumerate(batch.index.tolist()):
        row = [tiles.square(listing, index, SIDE)]
        row += [tiles.of_pixels(_pixels(v[i], crop), SIDE) for v, crop in zip(batch.views, crops)]
        for j, picture in enumerate(row):
            sheet.paste(picture, (j * (SIDE + GAP), i * (SIDE + GAP)))
    return sheet


def _pixels(view: torch.Tensor, crop: Crop) -> np.ndarray:
    """[3,S,S] of the network -> [S,S,3] of 0..255."""
    x = view.permute(1, 2, 0).double() * torch.tensor(crop.std) + torch.tensor(crop.mean)
    return (255 * x).numpy()
