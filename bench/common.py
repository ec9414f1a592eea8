"""What benches share: the result file, with what is needed to repeat and to doubt it; clocks; what
they train and read."""

import datetime
import io
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a bench runs from a checkout, installed or not
RESULTS = ROOT / "bench" / "results"


def row(
    name: str,
    value: float | None,
    unit: str,
    aim: float | None,
    better: str,
    reason: str | None = None,
) -> dict:
    """A line of a bench's summary; a value that no machine has produced is None, with the
    reason."""
    assert better in ("higher", "lower") and (value is None) == (reason is not None), name
    return dict(name=name, value=value, unit=unit, aim=aim, better=better) | (
        {"reason": reason} if reason else {}
    )


def row_of_rounds(
    name: str, values: list[float], digits: int, unit: str, aim: float | None, better: str
) -> dict:
    """The row of what each round gave: the median, and the quartiles beside it."""
    low, middle, high = (round(x, digits) for x in statistics.quantiles(values, n=4))
    return row(name, middle, unit, aim, better) | {"quartiles": [low, high]}


def write(
    bench: str, device: str, summary: list[dict], samples, folder: Path | None = None, **more
) -> Path:
    """<bench>-<device>.json in bench/results or the folder: summary, raw samples, versions, commit,
    hardware, command, date."""
    from fastdisco.run.environment import environment

    path = (folder or RESULTS) / f"{bench}-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {k: v for k, v in environment().items() if k != "host"}
    # Where data lie says nothing elsewhere.
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

    train, val = (
        data.listing(path, cfg.data.quarantine) for path in (cfg.data.train, cfg.data.val)
    )
    return knn.score(encode, train, val, cfg.data, cfg.view, cfg.eval, cfg.run.seed, device)[
        "knn_top1"
    ]


def jpeg(image, size: float) -> bytes:
    """The picture as a JPEG of the lowest quality, from 30 to 98, that makes it of `size` bytes or
    more."""

    def encoded(quality):
        f = io.BytesIO()
        image.save(f, "JPEG", quality=quality)
        return f.getvalue()

    low, high = 30, 98
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(encoded(middle)) >= size else (middle + 1, high)
    return encoded(low)


def elapsed_ms(run, repeats: int) -> float:
    """Of so many calls, on the GPU's clock."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def now(device) -> float:
    """Seconds, when all ranks and the device have done what was asked of them."""
    import torch

    from fastdisco.common import dist

    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()
