"""How long a user waits before anything happens, in seconds of the clock.

    python bench/startup.py [--rounds 9] [--cores 2]

Each round starts three fresh processes of the real commands, on so many cores and without a GPU:
- help_s        `fastdisco --help`, until it has ended
- wrong_key_s   `fastdisco/train.py` with a key that no block has, until it has ended
- first_step_s  `fastdisco/train.py --config tests/tiny.yaml` on a folder of 43 small images, until it
                has said that step 1 is done; the evaluation after it does not count
One round before them does not count: it fills the disk cache and compiles Python files.  Writes
bench/results/startup-cpu.json."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import ROOT, command, row_of_rounds
from PIL import Image

AIMS = {"help_s": 0.3, "wrong_key_s": 1.0, "first_step_s": 12.0}
CONFIG = ("--config", "tests/tiny.yaml")


def main() -> None:
    options = command.parser(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--cores", type=int, default=2)
    options.add_argument("--out", type=Path, help="folder of the result, if not bench/results")
    args = options.parse_args()
    # The processes that are started inherit it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    with tempfile.TemporaryDirectory() as folder:
        samples = measure(Path(folder), args.rounds)
    summary = [
        row_of_rounds(name, samples[name], 3, "s", aim, "lower") for name, aim in AIMS.items()
    ]
    command.finish("startup", "cpu", summary, samples, args.out)


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round; the folder takes images and runs."""
    images(folder / "images")
    arms: dict[str, Callable[[], float]] = {
        "help_s": help_,
        "wrong_key_s": wrong_key,
        "first_step_s": lambda: first_step(folder),
    }
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for r in range(rounds + 1):
        for name, arm in arms.items():
            seconds = arm()
            if r:
                samples[name].append(seconds)
    return samples


def help_() -> float:
    return until_end(("-m", "fastdisco.cli", "--help"), 0, "usage: fastdisco")


def wrong_key() -> float:
    return until_end(("fastdisco/train.py", *CONFIG, "optim.lrr=1"), 2, "unknown key optim.lrr")


def first_step(folder: Path) -> float:
    data = f"data.train={folder}/images/train", f"data.val={folder}/images/val"
    steps = "run.max_steps=1", f"run.out={folder}/out", "--overwrite"
    return until_line(("fastdisco/train.py", *CONFIG, *data, *steps), "step 1/1 ")


def until_end(command: tuple[str, ...], code: int, says: str) -> float:
    """Seconds until the command has ended; it must end with that code and say that."""
    begin = time.perf_counter()
    process = start(command)
    text, _ = process.communicate()
    seconds = time.perf_counter() - begin
    assert process.returncode == code and says in text, f"{command}: {process.returncode}\n{text}"
    return seconds


def until_line(command: tuple[str, ...], says: str) -> float:
    """Seconds until the command has said that; it must then end well."""
    begin = time.perf_counter()
    process, text, seconds = start(command), "", None
    assert process.stdout
    for line in process.stdout:
        text += line
        if seconds is None and says in line:
            seconds = time.perf_counter() - begin
    assert process.wait() == 0 and seconds is not None, f"{command}: {process.returncode}\n{text}"
    return seconds


def start(command: tuple[str, ...]) -> subprocess.Popen[str]:
    """The command from the root of this checkout, without a GPU; stdout has its errors, too."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )


def images(root: Path) -> None:
    """43 JPEGs of 3 classes to train on and 12 to validate, of about 40 px."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 43), ("val", 12)):
        for i in range(n):
            path = root / part / f"class{i % 3}" / f"{i:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = rng.integers(0, 256, size=(4 + i % 3, 4, 3), dtype=np.uint8)
            Image.fromarray(small).resize((36 + i % 9, 40)).save(path, quality=90)


if __name__ == "__main__":
    main()
