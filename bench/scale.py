"""A model of a training step on 1 to 1,024 devices: where scaling stops, and what to change.

    python bench/scale.py
        configs/mobv3.yaml on nodes of eight A100 and of eight H100
    python bench/scale.py --config C --machine h100 [--device FILE]
        another configuration; FILE is what bench/throughput.py wrote on your GPU for this
        configuration, and takes the place of the published peaks; overrides follow as block.key=value
    python bench/scale.py --shipped
        the curves of all shipped configurations, written into bench/results/scale-cpu.json
    python bench/scale.py --ranks [--rounds N]
        the same, and compares the model with 1, 2 and 4 CPU ranks on this machine, which must be idle

Nothing about a GPU is measured here unless --device gives it: bench/scaling/hardware.yaml has the
published and the assumed numbers with their sources, docs/scaling.md what the model contains."""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from harness import ROOT, finish, parser, row
from harness.results import RESULTS
from harness.tables import show_table
from scaling import curve, devices, ranks, work

from fastdisco import config
from fastdisco.common.console import say
from fastdisco.config import UserError

DEFAULT = ROOT / "configs/mobv3.yaml"
MACHINES = ("a100", "h100")
# What the CPU ranks train: small enough for a machine of two cores, with gradients of 20 MB.
SMALL = [
    "student.arch=resnet10t",
    "student.hidden=128",
    "student.dim=64",
    "teacher.arch=resnet18",
    "method.queue=4096",
    "view.size=96",
    "data.threads=1",
    "data.val=null",
    "eval.every=0",
    "optim.per=step",
    "run.epochs=1000000",
]
BATCH = 8
RANKS = (1, 2, 4)
AIM = 0.15


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if not (args.ranks or args.shipped):
        cfg = config.load(args.config, args.overrides)
        for name in [args.machine] if args.machine else MACHINES:
            show(cfg, name, args.device)
        return 0
    curves = shipped_curves() if not args.quick else {}
    with tempfile.TemporaryDirectory(prefix="fastdisco-bench-") as folder:
        found = compared(Path(folder), args) if args.ranks else not_compared()
    summary, samples, measured = found
    tables = {"stops": stops(curves)} if curves else {}
    about = dict(rounds=args.rounds, seconds=args.seconds, measured=measured, curves=curves)
    finish("scale", "cpu", summary, samples, args.out, tables=tables, **about)
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add("--config", type=Path, default=DEFAULT)
    add("--machine", choices=MACHINES, help="both without it")
    add("--device", type=Path, help="a result of bench/throughput.py on one GPU")
    add("--shipped", action="store_true", help="write the curves of all shipped configurations")
    add("--ranks", action="store_true", help="the same, and compare with CPU ranks")
    add("--rounds", type=int, default=8)
    add("--seconds", type=float, default=2.0, help="of each arm in a round, at least two steps")
    add("--quick", action="store_true", help="with --ranks: does it run?")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    add("overrides", nargs="*", metavar="block.key=value")
    args = options.parse_intermixed_args(argv)
    if args.quick:
        args.rounds, args.seconds = 2, 0.0
    return args


# ---- the curve of a configuration


def show(cfg: config.Config, name: str, file: Path | None) -> None:
    """Prints the curve, where it stops, and what the changes bring."""
    job = work.job(cfg)
    device, machine = devices.published(name, loader_core())
    if file:
        device = devices.from_throughput(file, cfg)
    steps = curve.curve(job, device, machine)
    source = f"device measured: {file}" if file else "model, not measured"
    lines = []
    for n, step in steps.items():
        parts = [f"{1e3 * x:.2f}" for x in step[1:]]
        share = step.rate / (n * steps[1].rate)
        lines.append([str(n), f"{step.rate:.0f}", f"{share:.0%}", *parts])
    columns = ["GPUs", "images/s", "efficiency", *(f"{x} ms" for x in step._fields[1:])]
    show_table(f"{machine.name}, batch {job.batch}; {source}", columns, lines)
    say(verdict(curve.limit(steps), machine.image))
    for change, changed in curve.remedies(job).items():
        end = curve.limit(curve.curve(changed, device, machine))
        say(f"  {change}: pays up to {end.count} GPUs, {end.step.rate:.0f} images/s there")
    if not file:
        say("replace it by the file that bench/throughput.py writes on your GPU: --device FILE")


def verdict(end: curve.Limit, image: float) -> str:
    """Where the curve ends, in words.  image: bytes of one."""
    rate = end.step.rate
    text = (
        f"Scaling pays up to {end.count} GPUs: {rate:.0f} images/s, for which the storage gives "
        f"{rate * image / 1e6:.0f} MB/s."
    )
    return f"{text} Then {end.reason} stops it: {curve.REMEDY[end.reason]}." if end.reason else text


def loader_core() -> float:
    """Images/s that one core decodes and augments, as bench/loader.py measured it."""
    found = json.loads((RESULTS / "loader-cpu.json").read_text())
    rows = {r["name"]: r["value"] for r in found["summary"]}
    return rows["loader_ips_cpu_1_threads"]


# ---- the curves of what is shipped


def shipped() -> list[Path]:
    """The configurations of docs/results.md, without the demo's."""
    found = sorted((ROOT / "configs").rglob("*.yaml"), key=lambda p: (len(p.parts), p))
    return [p for p in found if p.parent.name not in ("base", "demo")]


def shipped_curves() -> dict[str, dict[str, dict]]:
    """Configuration -> machine -> images/s by number of GPUs, where it stops and what helps.  Those
    that ask the same of a machine appear once, under the first one's name."""
    seen, found = [], {}
    for path in shipped():
        job = work.job(config.load(path))
        if job in seen:
            continue
        seen.append(job)
        name = str(path.relative_to(ROOT / "configs").with_suffix(""))
        found[name] = {m: of_machine(job, m) for m in MACHINES}
    return found


def of_machine(job: work.Job, name: str) -> dict:
    device, machine = devices.published(name, loader_core())
    steps = curve.curve(job, device, machine)
    end = curve.limit(steps)
    changed = {
        change: curve.curve(other, device, machine) for change, other in curve.remedies(job).items()
    }
    ends = {change: curve.limit(c) for change, c in changed.items()}
    rates = lambda steps: {n: round(step.rate) for n, step in steps.items()}
    return dict(
        batch=job.batch,
        ips=rates(steps),
        count=end.count,
        reason=end.reason,
        changes={
            c: dict(ips=rates(changed[c]), count=e.count, reason=e.reason) for c, e in ends.items()
        },
    )


def stops(curves: dict[str, dict[str, dict]]) -> dict:
    """The page's table."""
    columns = ["configuration", "batch"]
    for m in MACHINES:
        name = m.upper()
        columns += [
            f"{name}: pays up to",
            "images/s there",
            "stopped by",
            "with all three changes",
        ]
    rows = []
    for name, found in curves.items():
        cells = [f"`{name}`", str(found[MACHINES[0]]["batch"])]
        for m in MACHINES:
            x = found[m]
            last = list(x["changes"].values())[-1]
            best = f"{last['count']} GPUs, {last['ips'][last['count']]:,} images/s"
            cells += [str(x["count"]), f"{x['ips'][x['count']]:,}", x["reason"], best]
        rows.append(cells)
    return dict(columns=columns, rows=rows)


# ---- the comparison with CPU ranks


def compared(folder: Path, args: argparse.Namespace) -> tuple[list[dict], dict, dict]:
    """Rows, every sample, and predictions beside measurements in ms."""
    from step.setup import provide

    file, overrides = ROOT / "configs/mobv3.yaml", small(folder)
    cfg = config.load(file, overrides)
    provide(cfg, folder, 256, teacher=True, scale=0.3)
    cores = len(os.sched_getaffinity(0))
    found = ranks.rounds(file, overrides, args.rounds, args.seconds)
    job = work.job(cfg)
    summary, table = [], {}
    for n in RANKS:
        model = [ranks.predicted(job, BATCH, n, cores, seen) for seen in found]
        real = [statistics.mean(seen.ranks[n]) for seen in found]
        ratios = [step.seconds / took for step, took in zip(model, real)]
        summary.append(error(n, round(abs(statistics.median(ratios) - 1), 3)))
        table[n] = dict(
            measured_ms=1e3 * statistics.median(real),
            predicted_ms=1e3 * statistics.median(s.seconds for s in model),
            ratios=[round(x, 3) for x in ratios],
            parts_ms={
                part: 1e3 * statistics.median(getattr(s, part) for s in model)
                for part in model[0]._fields[1:]
            },
        )
    return summary, [seen._asdict() for seen in found], table


def not_compared() -> tuple[list[dict], dict, dict]:
    why = "not compared yet; python bench/scale.py --ranks does it on an idle machine"
    return [error(n, None, why) for n in RANKS], {}, {}


def error(ranks: int, value: float | None, reason: str | None = None) -> dict:
    name = f"scale_error_{ranks}rank{'s' * (ranks > 1)}"
    unit = "of the measured step: how far the model is off"
    return row(name, value, unit, AIM, "lower", reason)


def small(folder: Path) -> list[str]:
    """What the CPU ranks change of configs/mobv3.yaml."""
    own = [f"data.train={folder}/images", f"teacher.file={folder}/teacher.pth.tar"]
    return [
        *SMALL,
        *own,
        f"data.batch={BATCH}",
        f"run.out={folder}/out",
        "student.kwargs={}",
        "teacher.kwargs={}",
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        sys.exit(f"fastdisco: error: {e}")
