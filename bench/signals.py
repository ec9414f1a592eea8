"""How long a training of 2 ranks takes to save and end after a signal, in seconds of the clock.

    python bench/signals.py [--signals 100] [--seed 0]

Each arm starts the real command on 43 small images, waits for its first checkpoint, sends SIGTERM,
SIGINT or SIGUSR1 to one process of the tree, drawn by the seed: the launcher (deepspeed or torchrun),
what is between, or a rank.  The clock stops when both ranks are gone.  They must have saved the step
that they say, otherwise the bench fails.

A 99th percentile needs 100 signals and a machine that does nothing else; with less the row has no
value, and says why.  Signals that were sent before, on the same commit and hardware, count.  Writes
bench/results/signals-cpu.json."""

import contextlib
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import startup
from harness import ROOT, command, results, row

AIM = 10.0
NEEDED = 100
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHERS = ("deepspeed", "torchrun")
# Seconds after which a training that was asked to stop hangs.
HANGS = 600.0


def main() -> None:
    options = command.parser(__doc__)
    options.add_argument("--signals", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="folder of the result, if not bench/results")
    args = options.parse_args()
    load = os.getloadavg()[0]
    samples = results.earlier("signals", "cpu", args.out) or {"signals": [], "load": []}
    draw = random.Random(args.seed + len(samples["signals"]))
    with tempfile.TemporaryDirectory() as folder:
        startup.images(Path(folder) / "images")
        for i in range(args.signals):
            samples["signals"].append(one(Path(folder), i, draw))
            samples["load"].append(load)
            print(samples["signals"][-1], flush=True)
    command.finish("signals", "cpu", [summary(samples)], samples, args.out)


def summary(samples: dict[str, list]) -> dict:
    """The row of all signals; without a value where they do not tell it."""
    seconds = [x["seconds"] for x in samples["signals"]]
    cores, load = len(os.sched_getaffinity(0)), max(samples["load"])
    reasons = []
    if len(seconds) < NEEDED:
        reasons.append(f"{len(seconds)} signals were sent; a 99th percentile needs {NEEDED}")
    if load > cores:
        reasons.append(f"others used the {cores} cores: a load of {load:.0f}")
    if reasons:
        reasons.append(f"the longest took {max(seconds):.1f} s")
    reason = "; ".join(reasons) or None
    value = None if reason else round(percentile(seconds), 2)
    return row("sigterm_p99_s", value, "s", AIM, "lower", reason)


def percentile(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100, method="inclusive")[98]


def one(folder: Path, number: int, draw: random.Random) -> dict:
    """Starts a training, stops it, and returns what was done and how long it took."""
    launcher, what = draw.choice(LAUNCHERS), draw.choice(NUMBERS)
    out = folder / str(number)
    out.mkdir()
    log, run = out / "log.txt", out / "tiny"
    with log.open("w") as f:
        top = subprocess.Popen(
            training(launcher, folder, out),
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=f,
            stderr=f,
        )
    try:
        wait(lambda: (run / "checkpoints/last").exists(), top, log)
        # Anywhere in a step.
        time.sleep(draw.random())
        tree = [top.pid, *below(top.pid)]
        ranks = [pid for pid in tree if "LOCAL_RANK" in environment(pid)]
        assert len(ranks) == 2, log.read_text()
        target = draw.choice(tree)
        begin = time.perf_counter()
        os.kill(target, what)
        wait(lambda: not any(map(alive, ranks)), None, log)
        took = time.perf_counter() - begin
    finally:
        top.kill()
        top.wait()
    said = log.read_text().partition("stopped as asked after step ")[2]
    step = int(said.split(";")[0]) if said else None
    assert step == saved(run), log.read_text()
    place = "rank" if target in ranks else "launcher" if target == top.pid else "between"
    return dict(launcher=launcher, signal=what.name, to=place, seconds=round(took, 3))


def training(launcher: str, folder: Path, out: Path) -> list[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = {
        "deepspeed": ["deepspeed.launcher.runner", "--num_accelerators=2", f"--master_port={port}"],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    }[launcher]
    data = f"data.train={folder}/images/train", "data.val=null", f"run.out={out}"
    steps = "run.epochs=100000", "log.every=1000000", "checkpoint.every=3"
    script = ("fastdisco/train.py", "--config", "tests/tiny.yaml")
    return [sys.executable, "-m", *start, *script, *data, *steps]


def wait(condition, process: subprocess.Popen | None, log: Path) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not ended and time.monotonic() < end, log.read_text()
        time.sleep(0.01)


def below(pid: int) -> list[int]:
    """The processes that a process and its children have started."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        # A thread may end in between.
        with contextlib.suppress(OSError):
            found += [int(x) for x in listed.read_text().split()]
    return found + [x for child in found for x in below(child)]


def environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text(errors="replace")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def saved(run: Path) -> int:
    """The step of the newest checkpoint."""
    return int((run / "checkpoints/last").read_text().strip().removeprefix("step_"))


if __name__ == "__main__":
    main()
