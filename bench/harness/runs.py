"""The real training command as a bench runs it, and what a finished run scores."""

import json
import sys
from pathlib import Path


def command(config: Path | str, *arguments: str) -> list[str]:
    """The command line of a training, to be run in the project's root."""
    return [sys.executable, "fastdisco/train.py", "--config", str(config), *arguments]


def metrics(run: Path) -> list[dict]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]


def untrained(run: Path):
    """The network that a run began with, in eval mode."""
    import torch

    from fastdisco import config, models

    cfg = config.load(run / "config.yaml")
    torch.manual_seed(cfg.run.seed)
    return models.of(cfg).to(memory_format=torch.channels_last).eval()


def knn_top1(encode, cfg, device) -> float:
    """The kNN accuracy, 0 to 1, of any features, by the evaluation that ends a run of this
    configuration.

    encode  images [B,3,S,S] -> features [B,d]"""
    from fastdisco import data
    from fastdisco.evals import knn

    train, val = (
        data.listing(path, cfg.data.quarantine) for path in (cfg.data.train, cfg.data.val)
    )
    scores = knn.score(encode, train, val, cfg.data, cfg.view, cfg.eval, cfg.run.seed, device)
    return scores["knn_top1"]
