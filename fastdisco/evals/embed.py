"""Features and embeddings of a set of images, written for other tools."""

import json
from pathlib import Path

import numpy as np

from fastdisco import data
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.data.folder import EXTENSIONS
from fastdisco.evals.features import Features, gathered


def run(
    kinds: dict[str, Features], listing: data.Listing, folder: Path, form: str = "npy"
) -> dict[str, float]:
    """Writes <kind>.npy [N,F] float32 of each kind, with names.txt, one image a line in the same
    order, and labels.npy; or embed.parquet with a row for each image.  Rank 0 writes.

    kinds  this rank's own parts
    Returns the number of images and the widths.  Raises UserError where parquet cannot be
    written."""
    whole = {name: gathered(f) for name, f in kinds.items()}
    first = next(iter(whole.values()))
    names = [listing.files[i] for i in first.index.tolist()]
    arrays = {name: f.x.cpu().numpy() for name, f in whole.items()}
    if dist.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        labels = first.label.cpu().numpy()
        if form == "parquet":
            _parquet(folder / "embed.parquet", names, labels, arrays)
        else:
            _npy(folder, names, labels, arrays)
        write_whole(folder / "classes.json", json.dumps(listing.classes) + "\n")
    dist.barrier()
    widths = {f"{name}_width": float(x.shape[1]) for name, x in arrays.items()}
    return {"images": float(len(names))} | widths


def images(path: Path, quarantine: Path | None) -> data.Listing:
    """A data set as `data.listing` takes it, or a folder of images without classes."""
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        flat = [p.name for p in inside if p.suffix.lower().lstrip(".") in EXTENSIONS]
        if flat and not any(p.is_dir() or p.suffix == ".tar" for p in inside):
            labels = np.zeros(len(flat), np.int64)
            return data.Listing(path, path, flat, labels, ["unlabelled"])
    return data.listing(path, quarantine)


def _npy(folder: Path, names: list[str], labels: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    for name, x in (arrays | {"labels": labels}).items():
        part = folder / f".{name}.part.npy"
        np.save(part, x)
        part.replace(folder / f"{name}.npy")
    write_whole(folder / "names.txt", "".join(f"{n}\n" for n in names))


def _parquet(
    path: Path, names: list[str], labels: np.ndarray, arrays: dict[str, np.ndarray]
) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "embed.format: parquet needs pyarrow, which is not installed; pip install pyarrow, or "
            "take npy"
        ) from None
    columns = {"name": names, "label": labels}
    table = pyarrow.table(columns | {k: list(x) for k, x in arrays.items()})
    part = path.with_suffix(".part")
    pyarrow.parquet.write_table(table, part)
    part.replace(path)
