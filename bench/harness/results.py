"""A bench's rows, and its result file: bench/results/<bench>-<device>.json."""

import datetime
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results"


def row(
    name: str,
    value: float | None,
    unit: str,
    aim: float | None,
    better: str,
    reason: str | None = None,
) -> dict:
    """A line of a bench's summary.

    value   None where no machine has measured it; then `reason` says why
    aim     what the project wants to reach, None where it has no aim
    better  which way is better: higher or lower"""
    assert better in ("higher", "lower"), name
    assert (value is None) == (reason is not None), name
    found = dict(name=name, value=value, unit=unit, aim=aim, better=better)
    return found | ({"reason": reason} if reason else {})


def row_of_rounds(
    name: str, values: list[float], digits: int, unit: str, aim: float | None, better: str
) -> dict:
    """The row of a value that each round measured: the median, with the quartiles beside it."""
    low, middle, high = (round(x, digits) for x in statistics.quantiles(values, n=4))
    return row(name, middle, unit, aim, better) | {"quartiles": [low, high]}


def device_kind() -> str:
    """The part of a result's name that says where it was measured: "gpu" or "cpu"."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def earlier(bench: str, device: str, folder: Path | None = None) -> dict:
    """The samples of the result that write() left for the same commit on the same hardware, so that
    a bench may be run in pieces; empty where there is none."""
    from fastdisco.run.environment import environment

    path = (folder or RESULTS) / f"{bench}-{device}.json"
    if not path.exists():
        return {}
    then, here = json.loads(path.read_text()), environment()
    same = all(then[key] == here[key] for key in ("commit", "cpu", "gpus"))
    return then["samples"] if same else {}


def write(
    bench: str, device: str, summary: list[dict], samples, folder: Path | None = None, **more
) -> Path:
    """Writes <bench>-<device>.json into the folder, bench/results by default, and returns its path.

    The file holds the summary's rows, the raw samples, whatever else the bench gives, and what
    repeats the measurement: versions, commit, hardware, command and date."""
    from fastdisco.run.environment import environment

    path = (folder or RESULTS) / f"{bench}-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {k: v for k, v in environment().items() if k != "host"}
    # A folder of this machine says nothing elsewhere: its last part stays.
    about["command"] = " ".join(Path(x).name if Path(x).is_absolute() else x for x in sys.argv)
    content = dict(
        bench=bench,
        device=device,
        date=datetime.date.today().isoformat(),
        summary=summary,
        samples=samples,
        **more,
        **about,
    )
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
