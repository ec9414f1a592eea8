"""What every bench shares: its result file, with what is needed to repeat and to doubt it."""
import datetime
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a bench runs from a checkout, installed or not
RESULTS = ROOT / "bench" / "results"


def row(name: str, value: float | None, unit: str, aim: float | None, better: str, reason: str | None = None) -> dict:
    """A line of a bench's summary; a value that no machine has produced is None, with the reason."""
    assert better in ("higher", "lower") and (value is None) == (reason is not None), name
    return dict(name=name, value=value, unit=unit, aim=aim, better=better) | ({"reason": reason} if reason else {})


def write(bench: str, device: str, summary: list[dict], samples, folder: Path | None = None, **more) -> Path:
    """<bench>-<device>.json in bench/results or the folder: summary, raw samples, versions, commit, hardware, command, date."""
    from fastdisco import runs
    path = (folder or RESULTS) / f"{bench}-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {k: v for k, v in runs.environment().items() if k != "host"}
    content = dict(bench=bench, device=device, date=datetime.date.today().isoformat(), summary=summary, samples=samples, **more, **about)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
