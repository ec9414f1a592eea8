"""Writes a network as files that others load, and measures these files."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdisco.commands import arguments
from fastdisco.common.console import say
from fastdisco.common.errors import UserError

if TYPE_CHECKING:
    from fastdisco.commands.shipping import Job

COMMANDS = {"": "write a network for timm, torchvision, detectron2, ONNX or int8, and measure it"}
FORMATS = ("timm", "torchvision", "detectron2", "onnx", "int8")
# Exit code where a file in int8 lost more accuracy than allowed, and was written as .rejected.
REJECTED = 3


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco export`."""
    parser.add_argument(
        "network",
        nargs="+",
        metavar="NET",
        help="a run's folder, one of its checkpoints/step_XXXXXXXX, a teacher's file, or timm:NAME",
    )
    parser.add_argument(
        "--to", nargs="+", default=[], metavar="FORMAT", help=f"of {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="by default RUN/export; a folder each for several"
    )
    arguments.of_network(parser)
    parser.add_argument(
        "--calibrate",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="images that int8's ranges are taken of and ONNX is compared on; by default the run's "
        "training images",
    )
    parser.add_argument(
        "--calibration-images",
        type=int,
        default=256,
        metavar="N",
        help="drawn of them (%(default)s)",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="of accuracy that int8 may lose (%(default)s)",
    )
    parser.add_argument(
        "--opset", type=int, choices=(18, 19, 20), default=18, help="of ONNX (%(default)s)"
    )
    parser.add_argument(
        "--licence", metavar="ID", help="of the weights, as the Hugging Face hub writes it"
    )
    parser.add_argument("--bench", choices=("cpu",), help="measure size and speed of all forms")
    parser.add_argument(
        "--rounds", type=int, default=20, metavar="N", help="of the bench (%(default)s)"
    )
    arguments.overrides(parser, "for example data.val=/data/other eval.bank=50000")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Exports each network; the last line on stdout is a JSON of every value."""
    nets, overrides = _sorted(args)
    _check(args, nets)
    from fastdisco.commands import shipping

    # All are looked at before the first is written.
    jobs = [shipping.prepare(args, net, overrides, _folder(args.out, net, nets)) for net in nets]
    values: dict[str, Any] = {}
    for job in jobs:
        values[job.name] = shipping.ship(job) if args.to else {}
    if args.bench:
        _bench(jobs, args.rounds, values)
    print(json.dumps(values), flush=True)
    return REJECTED if any(v.get("int8_rejected") for v in values.values()) else 0


def _sorted(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(networks, overrides); argparse takes overrides that follow an option for values of it."""
    nets, found = arguments.parted([*args.network, *args.overrides])
    args.to, after_to = arguments.parted(args.to)
    images, after_images = arguments.parted([str(x) for x in args.calibrate])
    args.calibrate = [Path(x) for x in images]
    return nets, [*found, *after_to, *after_images]


def _check(args: argparse.Namespace, nets: list[str]) -> None:
    if not nets:
        args.parser.error("name a network: a run's folder, a teacher's file or timm:NAME")
    if strange := [x for x in args.to if x not in FORMATS]:
        raise UserError(
            f"--to: {strange[0]} is none of {', '.join(FORMATS)}; networks come before it"
        )
    if not args.to and not args.bench:
        raise UserError(
            f"export: says nothing to do; give --to {' '.join(FORMATS)}, or --bench cpu"
        )
    if len({Path(net).resolve() for net in nets}) < len(nets):
        raise UserError("export: the same network is named twice; name each once")
    for name, value, least in (
        ("--calibration-images", args.calibration_images, 1),
        ("--rounds", args.rounds, 1),
        ("--max-drop", args.max_drop, 0),
    ):
        # So written that nan fails, too.
        if not value >= least:
            raise UserError(f"{name}: is {value}; give {least} or more")


def _folder(out: Path | None, net: str, nets: list[str]) -> Path | None:
    """The folder that was asked for; of several networks each gets its own."""
    if out is None or len(nets) == 1:
        return out
    names = [Path(x.removeprefix("timm:")).name for x in nets]
    if len({*names}) < len(names):
        raise UserError(f"--out: two networks would be written as {names}; export them one by one")
    return out / Path(net.removeprefix("timm:")).name


def _bench(jobs: list["Job"], rounds: int, values: dict[str, Any]) -> None:
    from fastdisco.evals import results
    from fastdisco.export import bench
    from fastdisco.run.environment import environment

    forms = [form for job in jobs for form in job.forms()]
    say(f"bench: {len(forms)} forms, {rounds} rounds")
    rows = bench.measure(forms, rounds)
    about = environment()
    title, *cells = bench.lines(rows)
    versions = ", ".join(f"{k} {about['versions'].get(k, 'absent')}" for k in bench.TOLD)
    notes = [f"{about['cpu']}, {about['cores']} cores; {versions}", f"MACs by {bench.COUNTER}"]
    print(results.text(results.Table(title, cells, notes)))
    for job in jobs:
        own = [row for row in rows if row["network"] == job.name]
        job.folder.mkdir(parents=True, exist_ok=True)
        bench.write(job.folder / "bench.json", own, about)
        say(f"{job.folder / 'bench.json'}: the bench of {job.name}")
        values[job.name] |= {
            f"{row['form']}/{key}": x
            for row in own
            for key, x in row.items()
            if isinstance(x, float | int)
        }
