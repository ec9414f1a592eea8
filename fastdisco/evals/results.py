"""Results of evaluations: one JSON for each protocol, and tables of several runs that compare like
with like."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdisco.common import dist, temporary
from fastdisco.common.errors import UserError
from fastdisco.common.files import naming, read_json, read_regular, write_whole
from fastdisco.config.merge import flatten
from fastdisco.evals import intervals

# Of a protocol, what may differ within a column: whose numbers they are (each network's are beside its
# own teacher), and what computed them.
OWN = ("network", "teacher", "versions")


class Result(NamedTuple):
    what: str
    values: dict[str, float]
    # With the blocks `network` and `versions`; whatever can change a number is in it.
    protocol: dict[str, Any]
    # [N] int64 each, by the name of the value that they are of; in the order of the images'
    # indices.
    predictions: dict[str, np.ndarray]
    labels: np.ndarray | None
    seconds: float
    # 95 % each, by the name of the value.
    intervals: dict[str, tuple[float, float]]

    @property
    def hash(self) -> str:
        return short_hash(self.protocol)

    def named(self, key: str) -> str:
        """A value's name where results stand together: of evaluations that one run can have
        several of, it says which."""
        several = self.what.partition("-")[0] in ("semi", "finetune", "transfer")
        return f"{self.what}/{key}" if several else key


def make(
    what: str,
    values: dict[str, float],
    protocol: dict[str, Any],
    seconds: float,
    predictions: dict[str, np.ndarray] | None = None,
    labels: np.ndarray | None = None,
) -> Result:
    """With an interval for every value that there are predictions of."""
    found = predictions or {}
    ends = {k: tuple(intervals.bootstrap(p == labels)) for k, p in found.items()}
    return Result(what, values, protocol, found, labels, seconds, ends)


def short_hash(protocol: dict[str, Any]) -> str:
    """8 hexadecimal digits."""
    text = json.dumps(protocol, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


def refuse_unwritable(folder: Path, option: str = "--out") -> None:
    """Raises UserError where no result can be written to the folder, which need not be there: an
    evaluation takes hours, and would end in vain.  option: names another folder."""
    if dist.rank():
        # Rank 0 writes, and the place may be its machine's alone.
        return
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(
            f"{there}: is no folder, so results cannot be written to {folder}; give another {option}"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"{there}: cannot be written to; make it writable, or give another {option} for the results"
        )


def write(folder: Path, result: Result) -> Path:
    """<what>-<hash>.json, with the predictions beside it: another protocol has another name, and
    only the same one is written anew."""
    folder.mkdir(parents=True, exist_ok=True)
    # Of evaluations that were killed.
    temporary.sweep(folder)
    path = folder / f"{result.what}-{result.hash}.json"
    if result.labels is not None:
        part = temporary.part(path.with_suffix(".npz"))
        names, rows = list(result.predictions), list(result.predictions.values())
        with naming(path.with_suffix(".npz")):
            try:
                with part.open("wb") as f:
                    np.savez_compressed(
                        f, labels=result.labels, names=names, predictions=np.stack(rows)
                    )
                part.replace(path.with_suffix(".npz"))
            finally:
                part.unlink(missing_ok=True)
    text = {
        "what": result.what,
        "hash": result.hash,
        "values": result.values,
        "intervals": result.intervals,
        "seconds": round(result.seconds, 3),
        "protocol": result.protocol,
    }
    write_whole(path, json.dumps(text, indent=1) + "\n")
    return path


def read(path: Path) -> Result:
    """Raises UserError for a file that is no result, or was changed since."""
    try:
        found = read_json(path)
        what, values, protocol = found["what"], found["values"], found["protocol"]
        ends = {k: (float(low), float(high)) for k, (low, high) in found["intervals"].items()}
        seconds = float(found["seconds"])
        whole = short_hash(protocol) == found["hash"]
        _refuse_others(what, values, protocol)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: is no result of an evaluation ({e}); run it again") from None
    if not whole:
        raise UserError(f"{path}: its hash is not that of its protocol; run the evaluation again")
    predictions, labels = _predictions(path.with_suffix(".npz"))
    return Result(what, values, protocol, predictions, labels, seconds, ends)


def _refuse_others(what: Any, values: Any, protocol: Any) -> None:
    """Raises ValueError for what no result has."""
    numbers = isinstance(values, dict) and all(type(v) in (int, float) for v in values.values())
    named = isinstance(protocol, dict) and isinstance(protocol.get("network"), dict)
    if not (isinstance(what, str) and numbers and named):
        raise ValueError("what, values or protocol are of another kind")


def _predictions(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Predictions by name, and labels; none where there is no such file."""
    try:
        with np.load(io.BytesIO(read_regular(path))) as stored:
            names, rows, labels = (stored[k] for k in ("names", "predictions", "labels"))
        if rows.shape != (len(names), len(labels)):
            raise ValueError("its arrays do not belong together")
    except FileNotFoundError:
        return {}, None
    # NumPy and zipfile raise all kinds of errors where the bytes make no sense.
    except Exception as e:
        told = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{path}: is damaged ({told}); run the evaluation again") from None
    return dict(zip(names.tolist(), rows)), labels


def read_all(folder: Path) -> list[Result]:
    """Every result in a folder, by the order of file names.  Raises UserError where there is none."""
    return [read(p) for p in _files(folder)]


def _files(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*-????????.json"))
    if not paths:
        raise UserError(f"{folder}: holds no results; run fastdisco eval first")
    return paths


def newest(folder: Path) -> tuple[list[Result], list[str]]:
    """The results of the weights that were evaluated last, for a run that went on has other weights,
    and of those that differ in their versions alone the last one; what was left out, in words."""
    found = [read(p) for p in sorted(_files(folder), key=lambda p: p.stat().st_mtime_ns)]
    last = found[-1].protocol["network"]
    same = [r for r in found if r.protocol["network"] == last]
    remarks = []
    if earlier := len(found) - len(same):
        remarks.append(f"{earlier} results of earlier weights are left out")
    kept: dict[str, Result] = {}
    other: set[str] = set()
    for r in same:
        rest = {k: v for k, v in r.protocol.items() if k != "versions"}
        before = kept.get(key := f"{r.what}-{short_hash(rest)}")
        if before is not None:
            one, two = (flatten(x.protocol.get("versions", {})) for x in (before, r))
            other |= {k for k in one | two if one.get(k) != two.get(k)}
        kept[key] = r
    if older := len(same) - len(kept):
        remarks.append(
            f"{older} results by other versions ({', '.join(sorted(other))}) are left out, for there "
            "are newer ones by the same protocol"
        )
    return sorted(kept.values(), key=lambda r: f"{r.what}-{r.hash}"), remarks


def is_share(key: str) -> bool:
    """Whether a value is an accuracy, 0..1, which is shown in percent."""
    return key == "map" or any(part in key for part in ("_top1", "_top5", "recall_at_"))


def number(value: float) -> str:
    """All digits of a count, four figures of anything else."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"


class Table(NamedTuple):
    columns: list[str]  # the first is that of the networks
    rows: list[list[str]]
    notes: list[str]


def table(runs: dict[str, Sequence[Result]], only: Sequence[str] = ()) -> Table:
    """Networks in rows, values in columns.

    runs  {name: its results}
    only  names of values; (): all that any has
    Raises UserError where one value has two protocols, naming what differs."""
    cells: dict[str, dict[str, tuple[str, Result]]] = {}
    for name, found in runs.items():
        for result in found:
            for key in result.values:
                full = result.named(key)
                if not only or full in only:
                    column = cells.setdefault(full, {})
                    if name in column:
                        _refuse(full, (name, column[name][1]), (name, result))
                    column[name] = _cell(key, result), result
    if not cells:
        raise UserError(f"table: none of the results has {', '.join(only) or 'a value'}")
    versions = set()
    for key, column in cells.items():
        (first, (_, reference)), *others = column.items()
        for name, (_, result) in others:
            if comparable(result.protocol) != comparable(reference.protocol):
                _refuse(key, (first, reference), (name, result))
        versions |= {
            json.dumps(r.protocol.get("versions"), sort_keys=True) for _, r in column.values()
        }
    rows = [[name, *(column.get(name, ("",))[0] for column in cells.values())] for name in runs]
    notes = ["accuracies in percent; in brackets: 95 % interval over the validation images"]
    if len(versions) > 1:
        notes.append(f"computed by other versions: {' and '.join(sorted(versions))}")
    return Table(["network", *cells], rows, notes)


def comparable(protocol: dict[str, Any]) -> dict[str, Any]:
    """What two results must share to stand in one column."""
    return {k: v for k, v in protocol.items() if k not in OWN}


def versus(
    first: Sequence[Result], second: Sequence[Result], only: Sequence[str] = ()
) -> dict[str, intervals.Paired]:
    """The paired difference of every value that both have predictions of.

    only  names of values; (): all
    Raises UserError where the protocols differ, or there is nothing to pair."""
    out = {}
    for a in first:
        for b in second:
            for key in a.predictions.keys() & b.predictions.keys():
                if a.what != b.what or (only and a.named(key) not in only):
                    continue
                if comparable(a.protocol) != comparable(b.protocol):
                    _refuse(key, ("the first", a), ("the second", b))
                assert a.labels is not None and b.labels is not None
                if not np.array_equal(a.labels, b.labels):
                    raise UserError(f"{key}: the two were measured on other images")
                right = (r.predictions[key] == r.labels for r in (a, b))
                out[a.named(key)] = intervals.paired(*right)
    if not out:
        wanted = f" named {', '.join(only)}" if only else ""
        raise UserError(
            f"versus: the two runs have no value{wanted} with stored predictions in common"
        )
    return dict(sorted(out.items()))


def differences(found: dict[str, dict[str, intervals.Paired]], beside: str) -> Table:
    """A row for each network and value, in percent points.

    found   {name: what `versus` returned for it}
    beside  the name of the network that they are compared with"""
    rows = []
    for name, pairs in found.items():
        for key, p in pairs.items():
            points = [f"{100 * x:.2f}" for x in (p.difference, *p.interval)]
            counts = [str(p.only_first), str(p.only_second)]
            rows.append([name, key, *points, f"{p.p:.2g}", *counts])
    numbers = ["difference", "low", "high", "p", "only_first", "only_second"]
    notes = [
        f"versus {beside}, in percent points, with the 95 % interval; p: McNemar's, exact; "
        "only_first, only_second: images that only one of the two gets right"
    ]
    return Table(["network", "value", *numbers], rows, notes)


def overview(found: Sequence[Result]) -> Table:
    """The values of one network, with the time that each evaluation took."""
    rows = []
    for result in found:
        seconds = f"{result.seconds:.1f}"
        for key in result.values:
            rows.append([result.what, key, _cell(key, result), seconds])
            # Of an evaluation with several values it stands in the first row.
            seconds = ""
    columns = ["evaluation", "value", "number", "seconds"]
    notes = ["accuracies in percent; in brackets: 95 % interval over the validation images"]
    return Table(columns, rows, notes)


def turned(t: Table) -> Table:
    """Values in rows, networks in columns."""
    columns, *rows = zip(t.columns, *t.rows)
    return Table(["value", *columns[1:]], [list(r) for r in rows], t.notes)


def text(t: Table) -> str:
    """Columns aligned, the numbers to the right."""
    wide = [max(len(r[i]) for r in (t.columns, *t.rows)) for i in range(len(t.columns))]
    lines = [
        "  ".join([r[0].ljust(wide[0]), *(x.rjust(w) for x, w in zip(r[1:], wide[1:]))]).rstrip()
        for r in (t.columns, *t.rows)
    ]
    return "\n".join([*lines, *t.notes])


def markdown(t: Table) -> str:
    rule = ["---", *["---:"] * (len(t.columns) - 1)]
    lines = ["| " + " | ".join(r) + " |" for r in (t.columns, rule, *t.rows)]
    return "\n".join([*lines, "", *t.notes])


def as_csv(t: Table) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([t.columns, *t.rows])
    return out.getvalue().rstrip("\n")


def _cell(key: str, result: Result) -> str:
    value = result.values[key]
    if key not in result.intervals:
        return f"{100 * value:.2f}" if is_share(key) else number(value)
    low, high = result.intervals[key]
    return f"{100 * value:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _refuse(key: str, one: tuple[str, Result], other: tuple[str, Result]) -> None:
    """Raises UserError with the first keys that differ."""
    a, b = (flatten(comparable(r.protocol)) for _, r in (one, other))
    differ = [k for k in sorted(a | b) if a.get(k) != b.get(k)]
    said = ", ".join(f"{k} ({a.get(k)} of {one[0]}, {b.get(k)} of {other[0]})" for k in differ[:3])
    if not differ:
        said = f"nothing but the network or the versions, both of {one[0]}"
    raise UserError(
        f"{key}: two protocols do not stand in one column; they differ in {said}; give "
        "the file of one result in place of its folder, or evaluate again alike"
    )
