"""Features and embeddings of a set of images, written for other tools."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from fastdisco import data
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.common.files import naming, write_whole
from fastdisco.data.lines import is_utf8, printable
from fastdisco.evals.features import Features, gathered


def run(
    kinds: dict[str, Features], listing: data.Listing, folder: Path, form: str = "npy"
) -> dict[str, float]:
    """Writes <kind>.npy [N,F] float32 of each kind, with names.txt, one image a line in the same
    order, and labels.npy; or embed.parquet with a row for each image.  Rank 0 writes.

    kinds  this rank's own parts
    Returns the number of images and the widths.  Raises UserError where a name cannot stand in
    parquet."""
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


def refuse_absent(form: str) -> None:
    """Raises UserError where what writes this form is not installed."""
    if form == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "embed.format: parquet needs pyarrow, which is not installed; pip install pyarrow, or "
            "take npy"
        )


def _npy(folder: Path, names: list[str], labels: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    for name, x in (arrays | {"labels": labels}).items():
        part = folder / f".{name}.part.npy"
        with naming(folder / f"{name}.npy"):
            np.save(part, x)
            part.replace(folder / f"{name}.npy")
    write_whole(folder / "names.txt", "".join(f"{n}\n" for n in names))


def _parquet(
    path: Path, names: list[str], labels: np.ndarray, arrays: dict[str, np.ndarray]
) -> None:
    import pyarrow
    import pyarrow.parquet

    if odd := [n for n in names if not is_utf8(n)]:
        raise UserError(
            f"embed.format: parquet holds text alone, and {len(odd)} names are not UTF-8, such as "
            f"{printable(odd[0])}; rename the files, or take npy"
        )
    columns: dict[str, Any] = {"name": names, "label": labels}
    for name, x in arrays.items():
        # Rows of one width, which readers take as a matrix.
        flat = pyarrow.array(np.ascontiguousarray(x).reshape(-1))
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(flat, x.shape[1])
    part = path.with_suffix(".part")
    with naming(path):
        pyarrow.parquet.write_table(pyarrow.table(columns), part)
        part.replace(path)
