"""What every bench shares: its result file, with what is needed to repeat and to doubt it."""
import datetime
import json
import sys
import time
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
    about["command"] = " ".join(Path(x).name if Path(x).is_absolute() else x for x in sys.argv)  # where data lie says nothing elsewhere
    content = dict(bench=bench, device=device, date=datetime.date.today().isoformat(), summary=summary, samples=samples, **more, **about)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def untrained(run: Path):
    """The network that a run began with, in eval mode."""
    import torch
    from fastdisco import config, models
    cfg = config.load(run / "config.yaml")
    torch.manual_seed(cfg.run.seed)
    return models.of(cfg).to(memory_format=torch.channels_last).eval()


def knn_top1(encode, cfg, device) -> float:
    """The evaluation that a run of this configuration ends with, of any features."""
    from fastdisco import data
    from fastdisco.evals import knn
    train, val = (data.listing(path, cfg.data.quarantine) for path in (cfg.data.train, cfg.data.val))
    return knn.score(encode, train, val, cfg.data, cfg.view, cfg.eval, cfg.run.seed, device)["knn_top1"]


def now(device) -> float:
    """Seconds, when all ranks and the device have done what was asked of them."""
    import torch
    from fastdisco import dist
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()
