"""What a run tells: metrics.jsonl, TensorBoard, and a progress bar on a terminal or plain lines
elsewhere; rank 0 only."""

import json
import math
import resource
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastdisco.common import dist
from fastdisco.common.console import console, say
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole


def named(
    scalars: dict[str, Any], weights: dict[str, float] = {}, student: str = ""
) -> dict[str, Any]:
    """Under their full names: loss -> train/loss, a term of the loss (in `weights`) ->
    train/loss_<term>, while others name their group themselves; of one of several students
    train/<student>/loss."""
    out = {}
    for name, value in scalars.items():
        group, _, rest = (
            name if "/" in name else f"train/loss_{name}" if name in weights else f"train/{name}"
        ).partition("/")
        out[f"{group}/{student}/{rest}" if student else f"{group}/{rest}"] = value
    return out


class Meter:
    """The scalars of the micro batches since the last look, left on the device until then, and
    where the time went."""

    def __init__(self, images: int, folder: Path, start: int):
        """images: per step, over all ranks; start: the step the loop begins at."""
        self.images, self.folder = images, folder
        self.names: list[str] = []
        self._forget(start)

    def add(self, scalars: dict[str, Tensor]):
        """The named scalars of one micro batch; no host sync."""
        self.names = list(scalars)
        self.rows.append(torch.stack([v.detach().float() for v in scalars.values()]))

    @contextmanager
    def waiting(self):
        """Around what waits for data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextmanager
    def paused(self):
        """Around what is not training."""
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def read(self, done: int, steps: int) -> dict[str, float]:
        """Means over micro batches and ranks since the last look, and the speed; here the loop
        waits for the device.

        Raises UserError where a value is not finite, naming the step and the term."""
        table = dist.all_mean(torch.stack(self.rows)).tolist()
        took, n = time.perf_counter() - self.begin, done - self.last
        for i, row in enumerate(table):
            for name, value in zip(self.names, row):
                if not math.isfinite(value):
                    raise UserError(
                        f"step {self.last + 1 + i * n // len(table)}: {name} is {value}; the last "
                        f"checkpoint, in {self.folder / 'checkpoints'}, is from before it: lower "
                        "optim.lr or set optim.clip, then train on"
                    )
        means = {name: sum(column) / len(table) for name, column in zip(self.names, zip(*table))}
        speed = {
            "perf/total_ips": n * self.images / took,
            "perf/compute_ips": n * self.images / max(took - self.waited, 1e-9),
            "perf/step_time": took / n,
            "perf/data_time": self.waited / n,
            "perf/data_share": self.waited / took,
            "perf/eta": took / n * (steps - done),
        }
        # Reserved, since what a graph's replay needs is not allocated anew; DALI's buffers are not
        # torch's.
        cuda = torch.cuda.is_available()
        peak = (
            torch.cuda.max_memory_reserved()
            if cuda
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        # Of the run so far, on this rank: of its GPU, or of the process.
        speed["perf/mem_gb"] = peak / 1e9
        self._forget(done)
        return means | speed

    def _forget(self, done: int):
        self.rows, self.waited, self.last, self.begin = [], 0.0, done, time.perf_counter()


class Log:
    """Writes metrics; a context manager that owns the bar."""

    def __init__(self, folder: Path, start: int, steps: int):
        """`start`: the step a resumed run continues at; later entries of an earlier attempt are
        dropped."""
        self.steps, self.best = steps, {}  # the best kNN accuracy by its name
        self.file = self.tb = self.bar = None
        if dist.rank():
            return
        from torch.utils.tensorboard import SummaryWriter

        self.tb = SummaryWriter(folder / "tb", purge_step=start + 1)
        path = folder / "metrics.jsonl"
        kept = (
            [x for x in path.read_text().splitlines(True) if json.loads(x)["step"] <= start]
            if start and path.exists()
            else []
        )
        for values in map(json.loads, kept):
            self._remember(values)
        write_whole(path, "".join(kept))
        self.file = path.open("a", buffering=1)
        if console.is_terminal:
            self.bar = Progress(
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("", total=steps, completed=start)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        for x in (self.bar, self.file, self.tb):
            if x:
                x.stop() if x is self.bar else x.close()

    def write(self, step: int, values: dict[str, float]):
        """Metrics after `step` steps, named group/name as in TensorBoard."""
        if not self.file:
            return
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            self.tb.add_scalar(name, value, step)
        if scores := self._remember(values):
            for name, knn in scores.items():
                say(
                    f"step {step}/{self.steps}  {_student(name)}kNN top-1 {knn:.2%}  best "
                    f"{self.best[name]:.2%}"
                )
            return
        line = self._line(values)
        if self.bar:
            self.bar.update(self.task, completed=step, description=line)
        else:
            say(
                f"step {step}/{self.steps}  epoch {values['train/epoch']:.2f}  {line}  ETA "
                f"{_hms(values['perf/eta'])}"
            )

    def _remember(self, values: dict[str, float]) -> dict[str, float]:
        scores = {k: v for k, v in values.items() if k.endswith("/knn_top1")}
        self.best |= {k: max(v, self.best.get(k, 0.0)) for k, v in scores.items()}
        return scores

    def _line(self, v: dict[str, float]) -> str:
        several = "train/loss" not in v  # then the sums alone
        losses = "  ".join(
            f"{k.removeprefix('train/')} {x:.4g}"
            for k, x in v.items()
            if (k.endswith("/loss") if several else k.startswith("train/loss"))
        )
        rate = "" if several else f"  lr {v['train/lr']:.3g}"
        best = "".join(f"  {_student(name)}kNN {x:.1%}" for name, x in self.best.items())
        return f"{losses}{rate}  {v['perf/total_ips']:.0f} images/s  data wait {v['perf/data_share']:.0%}{best}"


def _student(name: str) -> str:
    """eval/<student>/knn_top1 -> '<student> '"""
    return "".join(f"{part} " for part in name.split("/")[1:-1])


def _hms(seconds: float) -> str:
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02}:{s:02}"
