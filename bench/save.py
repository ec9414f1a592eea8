"""What saving costs a training: the share of its time that one checkpoint a minute takes, written by a
thread beside it and with the training waiting for it (checkpoint.background).

    python bench/save.py [--rounds 7] [--only mobv3 r50] [--folder out]

Each arm takes steps of MoCo-v2 with its queue of 65,536 keys on ready tensors, with the real engine,
EMA and saver.  Its seconds begin with a save, and end when the checkpoint is on disk, or after
--seconds.  What is lost is what they are longer than as many steps of the round's arm without a save:
the time that the training stands still, and what its steps are slower while the thread works.  A
share of 0.02 is 1.2 s of a minute.  Where others use the cores, the rows have no value.  The
checkpoints are written into a folder in --folder, which says what disk is measured.  Writes
bench/results/save-<device>.json."""

import functools
import os
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from harness import ROOT, finish, interleaved, now, parser, row, row_of_rounds
from harness.results import device_kind

from fastdisco import config, engine, models
from fastdisco.common import dist
from fastdisco.methods import Progress
from fastdisco.run import checkpoint, students
from fastdisco.run.saver import Saver

AIM = 0.02
MINUTE = 60.0
STUDENTS = {"mobv3": "mobilenetv3_large_100", "r50": "resnet50"}
# Whether the arm saves in the background; None: it does not save.
ARMS = {"none": None, "background": True, "waiting": False}


class Window(NamedTuple):
    """What an arm found in a round: seconds of so many steps, and those of them that the save held
    the training up."""

    seconds: float
    steps: int
    stall: float


def main() -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--only", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    add("--rounds", type=int, default=7)
    add("--seconds", type=float, default=4.0, help="of an arm in a round, at least")
    add("--images", type=int, default=16, help="a step")
    add("--size", type=int, default=96, help="pixels")
    add("--folder", type=Path, default=Path("out"), help="the disk that is measured")
    add("--out", type=Path, help="folder of the result, if not bench/results")
    args = options.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    load, device = os.getloadavg()[0], engine.start(config.Engine())
    samples, sizes = {}, {}
    for name in args.only:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="fastdisco-bench-") as folder:
            training = Training(STUDENTS[name], args.images, args.size, Path(folder), device)
            samples[name] = measure(training, args.rounds, args.seconds)
            files = checkpoint.last(Path(folder)).iterdir()
            sizes[name] = round(sum(file.stat().st_size for file in files) / 1e6, 1)
    engine.stop()
    about = dict(checkpoint_mb=sizes, images=args.images, size=args.size, load=load)
    summary = [line for name in args.only for line in rows(name, samples[name], busy(load))]
    finish("save", device_kind(), summary, samples, args.out, **about)


def busy(load: float) -> str | None:
    """Why there are no values on a machine with that load before the bench; None where there are."""
    cores = len(os.sched_getaffinity(0))
    return f"others used the {cores} cores: a load of {load:.0f}" if load > cores else None


def rows(name: str, windows: dict[str, list[Window]], reason: str | None) -> list[dict]:
    """The rows of a student, those of MobileNetV3-Large without a suffix; a reason: without values."""
    suffix = "" if name == "mobv3" else f"_{name}"
    share, stall = "of the time, at one save a minute", "s that a training stands still for a save"
    found = []
    for arm, more, aim in (("background", "", AIM), ("waiting", "_waiting", None)):
        shares = [x / MINUTE for x in lost(windows, arm)]
        stalls = [Window(*x).stall for x in windows[arm]]
        found.append(
            row_of_rounds(f"save_stall_share{suffix}{more}", shares, 4, share, aim, "lower")
        )
        found.append(row_of_rounds(f"save_stall{suffix}{more}_s", stalls, 3, stall, None, "lower"))
    if reason:
        keys = ("name", "unit", "aim", "better")
        return [row(value=None, reason=reason, **{k: x[k] for k in keys}) for x in found]
    return found


def lost(windows: dict[str, list[Window]], arm: str) -> list[float]:
    """Seconds that a save of the arm took from the training in each round."""
    pairs = [(Window(*a), Window(*b)) for a, b in zip(windows[arm], windows["none"])]
    return [a.seconds - a.steps * b.seconds / b.steps for a, b in pairs]


def measure(training: "Training", rounds: int, seconds: float) -> dict[str, list[Window]]:
    """Each arm's windows; one before them fills caches, and the copy's memory."""
    arms: dict[str, Callable[[], Window]] = {
        name: functools.partial(window, training, training.saver(background), seconds)
        for name, background in ARMS.items()
    }
    return interleaved(arms, rounds, warm_up=1)


def window(training: "Training", saver: Saver | None, seconds: float) -> Window:
    """Saves, where there is a saver, and takes steps until its checkpoint is on disk, and for so many
    seconds; one at least."""
    begin, stall, steps = now(training.device), 0.0, 0
    if saver:
        saver.save(training.done, ends=False)
        stall = time.perf_counter() - begin
    while not steps or (saver and saver.busy) or time.perf_counter() - begin < seconds:
        training.step()
        steps += 1
    end = now(training.device)
    if saver:
        saver.wait()
    return Window(end - begin, steps, stall)


class Training:
    """A training of MoCo-v2 as train.py makes it, on ready views of noise."""

    def __init__(self, arch: str, images: int, size: int, run: Path, device: torch.device) -> None:
        own = (
            f"student.arch={arch}",
            f"data.batch={images}",
            f"view.size={size}",
            f"run.out={run}",
        )
        precision = "bf16" if device.type == "cuda" else "fp32"
        cfg = config.load(ROOT / "configs/mobv3_moco.yaml", [*own, f"engine.precision={precision}"])
        self.run, self.device, self.done = run, device, 0
        self.state = students.create("", cfg, images, device)
        g = torch.Generator().manual_seed(0)
        shape = images, 3, size, size
        self.views = [
            torch.randn(shape, generator=g).to(device, memory_format=torch.channels_last)
            for _ in range(2)
        ]

    def saver(self, background: bool | None) -> Saver | None:
        """Of this training's state; None without saves."""
        if background is None:
            return None
        s, loader = self.state, types.SimpleNamespace(state=0)
        items = checkpoint.items(s.engine, s.ema, s.method, loader)
        return Saver(self.run, items, {}, 2, background)

    def step(self) -> None:
        """An optimizer step."""
        s = self.state
        terms = s.method.step(s.nets(None), self.views, Progress(self.done, 0.5, 100.0, self.done))
        s.engine.backward(s.method.loss(terms))
        s.engine.step()
        models.ema_update(s.ema, s.net, s.method.momentum(Progress(self.done, 0.5)))
        s.method.after_step()
        self.done += 1
        if self.device.type == "cuda":
            # A host that runs ahead would not see that the checkpoint is on disk.
            torch.cuda.synchronize()


if __name__ == "__main__":
    assert dist.world() == 1, "start it without a launcher"
    main()
