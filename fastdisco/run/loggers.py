"""Where metrics go beside metrics.jsonl: `log.to`.

TensorBoard's event files are written at once (board.py).  Weights & Biases and MLflow may wait for a
server: each has a thread of its own, so that the training waits for neither.  What fails there is said
once; metrics.jsonl has everything anyway.

RUN/loggers.json  {"wandb": ID, "mlflow": ID}: a run that continues goes on with the same runs there."""

import contextlib
import json
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fastdisco import config
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.common.files import read_json, write_whole
from fastdisco.config import Config
from fastdisco.run.board import Board

NAME = "loggers.json"
# Entries that wait for a server that does not answer; the oldest go first.
WAITING = 10_000
# Seconds that the end of a training waits for what has not been sent.
CLOSING = 30.0
# MLflow refuses longer values.
_LONGEST = 500


class Logger(Protocol):
    """One place that gets every metric."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Metrics after `step` steps, named group/name."""

    def close(self) -> None:
        """Ends it; nothing is written afterwards."""


def check(names: Sequence[str]) -> None:
    """Raises UserError where `log.to` names a package that is not installed."""
    for name in names:
        if name in _STARTS and find_spec(name) is None:
            raise UserError(
                f"log.to: {name} is not installed; pip install 'fastdisco[{name}]', or take it out "
                "of log.to"
            )


def create(cfg: Config, folder: Path, start: int) -> list[Logger]:
    """The loggers of `log.to`; none on ranks other than 0.

    start: the step that the run continues at.  Raises OSError where TensorBoard's file cannot be
    made."""
    if dist.rank():
        return []
    made: list[Logger] = []
    for name in dict.fromkeys(cfg.log.to):
        made.append(Behind(name, cfg, folder) if name in _STARTS else Board(folder / "tb", start))
    return made


class Behind:
    """A logger in a thread of its own, which makes it and is alone to call it: importing it, and
    asking its server, may take seconds or fail."""

    def __init__(self, name: str, cfg: Config, folder: Path) -> None:
        self._name, self._failed, self._closed = name, False, False
        self._entries: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(
            target=self._work, args=(cfg, folder), daemon=True, name=f"log to {name}"
        )
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._put((step, values))

    def close(self) -> None:
        """Waits for what has not been sent, but not for ever."""
        if self._closed:
            return
        self._closed = True
        self._put(None)
        self._thread.join(CLOSING)
        if self._thread.is_alive():
            self._tell(f"it did not take everything within {CLOSING:.0f} s")

    def _put(self, entry: tuple[int, dict[str, float]] | None) -> None:
        while True:
            try:
                return self._entries.put_nowait(entry)
            except queue.Full:
                self._tell(f"more than {WAITING} entries wait for it, the oldest are dropped")
                with contextlib.suppress(queue.Empty):
                    self._entries.get_nowait()

    def _work(self, cfg: Config, folder: Path) -> None:
        logger: Logger | None = None
        # A library may raise whatever it likes, SystemExit too: the training goes on.
        try:
            logger = _STARTS[self._name](cfg, folder)
        except BaseException as e:
            self._tell(_reason(e))
        while (entry := self._entries.get()) is not None:
            if logger:
                try:
                    logger.write(*entry)
                except BaseException as e:
                    self._tell(_reason(e))
        if logger:
            try:
                logger.close()
            except BaseException as e:
                self._tell(_reason(e))

    def _tell(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            say(
                f"log.to: {self._name} failed ({why}); the training goes on, and metrics.jsonl has "
                "what is missing there"
            )


class _Wandb:
    """A run of Weights & Biases.  WANDB_PROJECT, WANDB_MODE and its other variables are its own."""

    def __init__(self, cfg: Config, folder: Path) -> None:
        import wandb

        # Its own lines would tear the bar; nobody may be there to answer a question.
        settings = wandb.Settings(silent=True, console="off", login_timeout=30)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastdisco"),
            name=cfg.run.name,
            id=_id(folder, "wandb"),
            resume="allow",
            # Its files lie in RUN/wandb/.
            dir=str(folder),
            config=cfg.model_dump(mode="json"),
            settings=settings,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        # It drops steps before its last one; those of a run that continues are the same again.
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, or in mlflow.db beside the run's folder."""

    def __init__(self, cfg: Config, folder: Path) -> None:
        from mlflow import MlflowClient

        here = folder.absolute().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{here / 'mlflow.db'}"
        self._client = MlflowClient(uri)
        self._run = self._continued(folder) or self._new(cfg, folder, here)

    def _continued(self, folder: Path) -> str | None:
        """The run that this one continues; None where there is none, or where it was deleted."""
        from mlflow.exceptions import MlflowException

        found = _known(folder).get("mlflow")
        if found is None:
            return None
        try:
            self._client.update_run(found, status="RUNNING")
        except MlflowException as e:
            if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return found

    def _new(self, cfg: Config, folder: Path, here: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fastdisco")
        experiment = self._client.get_experiment_by_name(name)
        if experiment:
            number = experiment.experiment_id
        else:
            number = self._client.create_experiment(name, str(here / "mlartifacts"))
        run = self._client.create_run(number, run_name=cfg.run.name).info.run_id
        for key, value in config.flatten(cfg.model_dump(mode="json")).items():
            self._client.log_param(run, key, str(value)[:_LONGEST])
        _remember(folder, "mlflow", run)
        return run

    def write(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        # Of a student's name it takes no more than these.
        names = {name: re.sub(r"[^\w\-. :/]", "_", name) for name in values}
        metrics = [Metric(names[name], float(v), now, step) for name, v in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


_STARTS: dict[str, Any] = {"wandb": _Wandb, "mlflow": _Mlflow}


def _id(folder: Path, name: str) -> str:
    """The id of the run there, made up where there is none."""
    found = _known(folder).get(name)
    if found is None:
        found = secrets.token_hex(4)
        _remember(folder, name, found)
    return found


def _known(folder: Path) -> dict[str, str]:
    """{logger: id}; what is no such file counts as none."""
    try:
        found = read_json(folder / NAME)
    except (OSError, ValueError):
        return {}
    usable = isinstance(found, dict) and all(isinstance(v, str) for v in found.values())
    return found if usable else {}


# Two threads may write the file.
_writing = threading.Lock()


def _remember(folder: Path, name: str, found: str) -> None:
    with _writing:
        write_whole(folder / NAME, json.dumps(_known(folder) | {name: found}) + "\n")


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
