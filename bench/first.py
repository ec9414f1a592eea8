"""The first half hour on a GPU: whether fastdisco runs there, part after part.

    python bench/first.py
        all parts, in this order; `make gpu-first` runs this
    python bench/first.py --only twin trace
        some of them

environment  docker/check.py, and a training's own check: libraries, compiler, driver
kernels      the GPU tests of the losses' kernels
loader       the GPU tests of DALI's graphs
graphs       the GPU tests of CUDA graphs, and of backward and step beside plain torch
twin         ten steps of the real command on the GPU and on the CPU, loss by loss
throughput   bench/throughput.py for one batch, which leaves a result of its own
trace        ten steps under torch's profiler: what the GPU does, and whether it ever waits

Each part ends with its verdict.  After each one bench/results/first-gpu.json is written anew, so
what was found stays when a later part fails or the machine goes away.  A part that fails or takes
too long does not stop the others.  The exit code is the number of parts that failed."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from harness import ROOT, parser, row, runs, tables, write
from harness.results import RESULTS, device_kind, earlier
from harness.synthetic import jpegs, random_teacher

# Where the profiler's trace goes; it is too large for bench/results.
TRACES = ROOT / "out/first"
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
STEPS, BATCH = 10, 32
# Of pytest.  They share the GPU: starting and compiling take far longer than what it computes.
WORKERS = 4
# A training's own check of the device.
START = """
from fastdisco import config, engine
device = engine.start(config.Engine())
print(f"ok    engine     {device}, {engine.describe(device)}", flush=True)
engine.stop()
"""
# Row -> the part that gives it, unit, aim and what is better.
ROWS = {
    "first_environment": ("environment", "checks that failed", 0, "lower"),
    "first_kernels": ("kernels", "GPU tests that failed", 0, "lower"),
    "first_loader": ("loader", "GPU tests that failed", 0, "lower"),
    "first_graphs": ("graphs", "GPU tests that failed", 0, "lower"),
    "first_twin_loss_1": ("twin", "of the CPU's loss: distance of the GPU's", 1e-3, "lower"),
    "first_twin_losses": ("twin", "the same, the largest of losses 1 to 10", 2e-2, "lower"),
    "first_step_ips": ("throughput", "images/s, two views each", None, "higher"),
    "first_gpu_busy": ("trace", "of the time, summed over streams", 0.9, "higher"),
}


class Failed(Exception):
    """Why a part gave no numbers."""


class Part(NamedTuple):
    # Then it is stopped.
    minutes: float
    # (folder for what it makes, minutes) -> values by row, and details.
    run: Callable[[Path, float], dict]


def main(argv: list[str] | None = None) -> int:
    args, device = arguments(argv), device_kind()
    if device == "cpu":
        keep({}, args, "no GPU in this machine; make gpu-first on one measures it")
        return 0
    # Parts that an earlier command measured stay.
    found = earlier("first", device, args.out)
    found = {name: one for name, one in found.items() if name not in args.only}
    for name in [name for name in PARTS if name in args.only]:
        print(f"\n==== {name}, at most {PARTS[name].minutes:g} minutes", flush=True)
        found[name] = measured(PARTS[name])
        print(f"==== {name}: {verdict(name, found[name])}", flush=True)
        keep(found, args, "not reached yet")
    print("\n" + "\n".join(f"{name:12} {verdict(name, one)}" for name, one in found.items()))
    return sum(not good(name, found[name]) for name in args.only)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    names = dict(choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options.add_argument("--only", nargs="+", **names)
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    return options.parse_args(argv)


def keep(found: dict[str, dict], args: argparse.Namespace, reason: str) -> None:
    """Writes what is known so far.  reason: why the parts that did not run have no values."""
    summary = []
    for name, (part, unit, aim, better) in ROWS.items():
        one = found.get(part, {})
        value = one.get(name)
        why = one.get("failed", reason if part in args.only else "not asked for")
        summary.append(row(name, value, unit, aim, better, why if value is None else None))
    path = write("first", device_kind(), summary, found, args.out)
    if not found:
        tables.show_rows(summary)
    print(f"kept in {path}", flush=True)


def measured(part: Part) -> dict:
    """What the part found, or under `failed` why it found nothing."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastdisco-first-") as folder:
        try:
            found = part.run(Path(folder), part.minutes)
        # Whatever it was: the other parts still tell something.
        except Exception as e:
            found = {"failed": str(e) if isinstance(e, Failed) else f"{type(e).__name__}: {e}"}
    return found | {"minutes": round((time.monotonic() - begin) / 60, 2)}


def good(name: str, one: dict) -> bool:
    """Whether every number of the part reaches its aim."""
    return all(
        row in one and (aim is None or (one[row] <= aim if better == "lower" else one[row] >= aim))
        for row, (part, _, aim, better) in ROWS.items()
        if part == name
    )


def verdict(name: str, one: dict) -> str:
    numbers = [f"{row} {one[row]:.4g}" for row in ROWS if row in one]
    what = one.get("failed") or ", ".join(numbers)
    return f"{'ok' if good(name, one) else 'FAIL'}, {what} ({one['minutes']:g} minutes)"


# ---- the parts


def environment(folder: Path, minutes: float) -> dict:
    """docker/check.py, with this Python's commands on the path as after an installation."""
    bins = [str(Path(p, "bin")) for p in sys.path if Path(p, "bin").is_dir()]
    path = os.pathsep.join([str(Path(sys.executable).parent), *bins, os.environ["PATH"]])
    cache = Path.home() / ".cache"
    env = {"PATH": path, "TRITON_CACHE_DIR": f"{cache}/triton"}
    env |= {"TORCH_EXTENSIONS_DIR": f"{cache}/torch_extensions"}
    log = folder / "log"
    with log.open("w") as f:
        call([sys.executable, "docker/check.py"], minutes, env, f)
        f.flush()
        if code := call([sys.executable, "-c", START], minutes, env, f):
            print(f"FAIL  engine     does not start, exit code {code}", file=f)
    print(log.read_text())
    checks = [x for x in log.read_text().splitlines() if x.startswith(("ok ", "FAIL "))]
    if not checks:
        raise Failed("docker/check.py printed no check")
    return dict(first_environment=sum(x.startswith("FAIL") for x in checks), checks=checks)


def tests(row: str, *arguments: str) -> Callable[[Path, float], dict]:
    """The part that runs GPU tests, these arguments of pytest, and counts those that fail."""

    def part(folder: Path, minutes: float) -> dict:
        report = folder / "report.xml"
        options = ["-m", "gpu", "-rs", f"--junitxml={report}"]
        options += ["-n", str(WORKERS), "--dist", "worksteal"] if find_spec("xdist") else []
        code = call([sys.executable, "-m", "pytest", *arguments, *options], minutes)
        if not report.exists():
            raise Failed(f"pytest ended with exit code {code} and without a report")
        return {row: counted(report)[0], "names": counted(report)[1]}

    return part


def counted(report: Path) -> tuple[int, list[str]]:
    """(number, names) of the tests of pytest's report that failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    ran = [x for x in cases if x.find("skipped") is None]
    if not ran:
        raise Failed("no test ran")
    bad = [x for x in ran if x.find("failure") is not None or x.find("error") is not None]
    return len(bad), sorted(x.get("name", "") for x in bad)


def twin(folder: Path, minutes: float) -> dict:
    """The real command on both devices: float32 without TF32, views made on the CPU, so that
    nothing but rounding differs."""
    from fastdisco.models import heads

    jpegs(folder / "images", 2 * BATCH, 0.5)
    file = folder / "teacher.pth.tar"
    random_teacher(file, "resnet50", lambda dim: heads.mlp(dim, dim, 128))
    end = time.monotonic() + 60 * minutes
    losses = {}
    for name, env in (("gpu", {}), ("cpu", HIDDEN)):
        line = runs.command("configs/mobv3.yaml", *twin_overrides(name, folder, file))
        if code := call(line, (end - time.monotonic()) / 60, env):
            raise Failed(f"the run on the {name} ended with exit code {code}")
        lines = runs.metrics(folder / name)
        losses[name] = [x["train/loss"] for x in lines if "train/loss" in x]
    return compared(losses["gpu"], losses["cpu"])


def twin_overrides(name: str, folder: Path, teacher: Path) -> list[str]:
    return [
        f"run.name={name}",
        f"run.out={folder}",
        f"run.max_steps={STEPS}",
        "log.every=1",
        f"data.train={folder}/images",
        "data.val=null",
        "eval.every=0",
        f"data.batch={BATCH}",
        f"data.threads={len(os.sched_getaffinity(0))}",
        "data.decode=cpu",
        "data.augment=cpu",
        f"teacher.file={teacher}",
        "teacher.precision=fp32",
        "method.queue=4096",
        "method.queue_dtype=fp32",
        "engine.precision=fp32",
        "engine.tf32=false",
    ]


def compared(gpu: list[float], cpu: list[float]) -> dict:
    """How far the losses are apart, relative to the CPU's."""
    if not len(gpu) == len(cpu) == STEPS:
        raise Failed(f"{len(gpu)} and {len(cpu)} losses were logged, not {STEPS}")
    apart = [abs(a - b) / abs(b) for a, b in zip(gpu, cpu)]
    # A loss that is not a number is worse than any distance.
    worst = max((float("inf") if x != x else x) for x in apart)
    return dict(first_twin_loss_1=apart[0], first_twin_losses=worst, gpu=gpu, cpu=cpu)


def throughput(folder: Path, minutes: float) -> dict:
    """The whole bench in short.  Its JSON file is bench/results/throughput-gpu.json."""
    line = [sys.executable, "bench/throughput.py", "--batch", "256", "--minutes", "2.5"]
    if code := call([*line, "--rounds", "3", "--seconds", "0.5"], minutes):
        raise Failed(f"bench/throughput.py ended with exit code {code}")
    summary = json.loads((RESULTS / "throughput-gpu.json").read_text())["summary"]
    values = {r["name"]: r["value"] for r in summary}
    return dict(first_step_ips=values["step_ips_gpu"], rows=values)


def trace(folder: Path, minutes: float) -> dict:
    """bench/step/trace.py in a process of its own."""
    out = folder / "trace"
    if code := call([sys.executable, "bench/step/trace.py", str(out)], minutes):
        raise Failed(f"bench/step/trace.py ended with exit code {code}")
    TRACES.mkdir(parents=True, exist_ok=True)
    kept = shutil.copy(out / "trace.json.gz", TRACES)
    print(f"the trace is in {kept}; chrome://tracing and ui.perfetto.dev show it")
    found = json.loads((out / "found.json").read_text())
    return dict(first_gpu_busy=found["gpu_busy"], **found)


def call(line: list[str], minutes: float, env: dict[str, str] | None = None, out=None) -> int:
    """The exit code of a command in the project's root.  Raises Failed where it takes longer than
    the minutes; then it and all that it started are ended."""
    child = subprocess.Popen(
        line, cwd=ROOT, env=os.environ | (env or {}), stdout=out, start_new_session=True
    )
    try:
        return child.wait(max(0.0, 60 * minutes))
    except BaseException as e:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if isinstance(e, subprocess.TimeoutExpired):
            raise Failed(f"stopped after {minutes:.1f} minutes") from None
        raise


STEP_TESTS = [f"tests/test_{name}.py" for name in ("gpu_step", "graphs", "step")]
LOADER_TESTS = [f"tests/test_{name}.py" for name in ("data", "placement", "shards")]
# Those of CUDA graphs, and the steps beside plain torch; not the runs that look for waits.
GRAPHS = "graph or eager or dropout or fused or plain_torch or command"
PARTS = {
    "environment": Part(2, environment),
    "kernels": Part(7, tests("first_kernels", "tests/test_kernels.py", "tests/test_triton.py")),
    "loader": Part(4, tests("first_loader", *LOADER_TESTS)),
    "graphs": Part(6, tests("first_graphs", *STEP_TESTS, "-k", GRAPHS)),
    "twin": Part(3, twin),
    "throughput": Part(6, throughput),
    "trace": Part(2, trace),
}


if __name__ == "__main__":
    # What a part has started ends with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
