"""What the evaluations cost: time and memory beside one pass of the backbone.

    python bench/evals.py [--rounds 5] [--cores 2] [--only linear knn ridge all]
        parts that were measured at the same commit on the same machine are kept

- linear  an epoch of linear evaluation by DisCo's protocol with 64 learning rates at once, over the
          same with one: photographs, random crops of 224 px, the frozen backbone, 1000 classes, and
          as many validation images to training images as ImageNet has
- knn     10,000 queries among 50,000 images, 512 features, 1000 classes, six k from 1 to 200
- ridge   50,000 images, 512 features, 100 classes, 20 penalties, measured on 10,000
- all     the command `fastdisco eval all --only knn,retrieve,health,probe`, started in this process,
          over a bare pass of the same backbone over the same images: 1250 photographs of 100
          classes at 224 px
Arms of a part run in interleaved rounds, and a ratio is of one round.  Rows named cpu_time are of the
process's own time on all cores: another load on the machine shows there less than on the clock.
Writes bench/results/evals-cpu.json."""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from harness import finish, interleaved, parser, row, row_of_rounds, synthetic
from harness.results import earlier

# The student with the widest features for its cost first: its row is the one with the name.
STUDENTS = ("mobilenetv3_large_100", "resnet18")
# Of ImageNet, training images for each validation image.
TRAIN_TO_VAL = 25.6
# What runs no backbone of its own on random crops.
CACHED = "knn,retrieve,health,probe"
# A value of each.
MEASURED = ("knn_top1", "map", "rankme", "ridge_strength", "logistic_c", "sgd_diverged_heads")
# A round of an arm: seconds of the clock, and of the process on all cores.
Times = tuple[float, float]


class Sizes(NamedTuple):
    """What the parts are measured on; tests take smaller ones."""

    heads: int = 64
    linear_images: int = 512
    linear_classes: int = 1000
    students: tuple[str, ...] = STUDENTS
    bank: int = 50_000
    queries: int = 10_000
    width: int = 512
    penalties: int = 20
    all_train: int = 1000
    all_val: int = 250
    all_classes: int = 100
    pixels: int = 224


FULL = Sizes()


def main(argv: Sequence[str] | None = None, sizes: Sizes = FULL) -> list[dict]:
    args = arguments(argv)
    # What is imported below makes its threads by it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    import torch

    torch.set_num_threads(args.cores)
    samples = earlier("evals", "cpu", args.out)
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            samples[part] = PARTS[part](Path(folder) / part, sizes, args.rounds)
    rows = summary(samples, sizes)
    finish("evals", "cpu", rows, samples, args.out, sizes=sizes._asdict())
    return rows


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--cores", type=int, default=2)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--out", type=Path, help="folder of the result, if not bench/results")
    return options.parse_args(argv)


def timed(run: Callable[[], object]) -> Times:
    """Seconds of one call: of the clock, and of the process on all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def linear(folder: Path, sizes: Sizes, rounds: int) -> dict[str, dict[str, list[Times]]]:
    """{student: {number of heads: times}}"""
    import torch

    from fastdisco import config, data, models
    from fastdisco.evals import frozen, steps
    from fastdisco.evals import linear as heads
    from fastdisco.evals.features import Features
    from fastdisco.evals.protocols import PRESETS, crop

    synthetic.jpegs(folder / "images", sizes.linear_images)
    listing, cpu = data.listing(folder / "images"), torch.device("cpu")
    own = dict(epochs=1, size=sizes.pixels, resize=sizes.pixels)
    protocol = PRESETS["disco"].model_copy(update=own)
    usual = config.Data(train=folder)
    rates = [heads.Rate(0.1 * (i + 1), 0.0) for i in range(sizes.heads)]

    def evaluation(arch: str) -> Callable[[int], object]:
        net = models.create(arch, lambda width: torch.nn.Identity(), sizes=(sizes.pixels,)).eval()
        encode = frozen.encoder(net.features, "fp32", cpu)
        at_a_time = min(len(listing.kept), steps.chunk(protocol.batch, usual.eval_batch))
        loader = data.TrainLoader(listing, [crop(protocol)], at_a_time, 0, 1, 1, usual.threads, cpu)
        with torch.no_grad():
            width = net.features(torch.zeros(1, 3, sizes.pixels, sizes.pixels)).shape[1]
        n = max(2, round(sizes.linear_images / TRAIN_TO_VAL))
        val = Features(torch.randn(n, width), torch.arange(n) % 10, torch.arange(n))

        def run(several: int) -> None:
            source = steps.crops(loader, listing.kept, encode, protocol.batch, 0)
            classes = sizes.linear_classes
            heads.run(source, val, None, classes, protocol, rates[:several])

        return run

    found = {}
    for arch in sizes.students:
        run = evaluation(arch)
        arms = {str(n): lambda n=n, run=run: timed(lambda: run(n)) for n in (1, sizes.heads)}
        found[arch] = interleaved(arms, rounds, warm_up=1)
    return found


def knn(folder: Path, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Times, and GiB at the peak above what the features themselves take, in a fresh process."""
    search = searched(sizes)
    times = [timed(search) for _ in range(rounds)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return dict(times=times, gib=pool.submit(peak_gib, sizes).result())


def searched(sizes: Sizes) -> Callable[[], object]:
    from fastdisco.evals import neighbours

    bank, queries = (
        features(n, sizes.width, sizes.linear_classes, seed)
        for seed, n in enumerate((sizes.bank, sizes.queries))
    )
    return lambda: neighbours.run(bank, queries, sizes.linear_classes)


def peak_gib(sizes: Sizes) -> float:
    """What a search adds to this process's memory at its peak."""
    few = sizes._replace(bank=256, queries=256)
    # What the first product allocates for good is not the search's.
    searched(few)()
    search = searched(sizes)
    before = memory("VmRSS")
    search()
    return (memory("VmHWM") - before) / 2**20


def memory(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


def ridge(folder: Path, sizes: Sizes, rounds: int) -> dict[str, list[Times]]:
    import torch

    from fastdisco.evals import ridge as regression
    from fastdisco.evals.settings import STRENGTHS

    assert len(STRENGTHS) == sizes.penalties
    bank = features(sizes.bank, sizes.width, 100, 0)
    val = features(sizes.queries, sizes.width, 100, 1)
    held = bank.take(torch.arange(0, sizes.bank, 100))
    run = lambda: regression.run(bank, held, val, 100)
    return dict(times=[timed(run) for _ in range(rounds)])


def features(images: int, width: int, classes: int, seed: int) -> Any:
    """Like a network's: positive, of very different spread, with classes that overlap."""
    import torch

    from fastdisco.evals.features import Features

    shared, own = (torch.Generator().manual_seed(s) for s in (1000, seed))
    centres = torch.randn(classes, width, generator=shared)
    spread = torch.logspace(0, -2, width)
    label = torch.randint(classes, (images,), generator=own)
    x = torch.randn(images, width, generator=own).mul_(4).add_(centres[label])
    return Features(x.mul_(spread).add_(1).relu_(), label, torch.arange(images))


def whole(folder: Path, sizes: Sizes, rounds: int) -> dict[str, list[Times]]:
    """{"all": times, "pass": times}"""
    import torch

    from fastdisco.models import heads

    for part, n, seed in (("train", sizes.all_train, 0), ("val", sizes.all_val, 1)):
        synthetic.zones(folder / part, n, sizes.all_classes, seed, 0.75)
    # A student's weights where it can be measured without one being trained.
    net, arch = folder / "student.pth", sizes.students[0]
    synthetic.random_teacher(net, arch, lambda width: heads.mlp(width, width, 128))
    command = [
        *("eval", "all", str(net), "--arch", arch, "--only", CACHED),
        *("--out", str(folder / "eval")),
        *(f"data.{part}={folder / part}" for part in ("train", "val")),
        *(f"data.eval_size={sizes.pixels}", f"data.eval_resize={sizes.pixels * 8 // 7}"),
    ]
    arms = {"all": lambda: said(command), "pass": bare(command)}
    torch.manual_seed(0)
    return interleaved({k: lambda v=v: timed(v) for k, v in arms.items()}, rounds)


def said(command: list[str]) -> str:
    """What the command prints on stdout; it must end well, and may leave nothing out."""
    from fastdisco import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(command)
    values = json.loads(out.getvalue().splitlines()[-1])
    assert code == 0 and all(f"eval/{x}" in values for x in MEASURED), (code, command, values)
    return out.getvalue()


def bare(command: list[str]) -> Callable[[], object]:
    """A pass of the command's network over its images, and nothing else."""
    import torch

    from fastdisco import cli
    from fastdisco.commands import arguments, measure, networks
    from fastdisco.evals import passes, settings

    args = arguments.parse(cli._parser(command), command)
    theirs, ours = settings.split(args.overrides)
    network = networks.read(args, theirs)
    work = measure.Work(network, settings.load(ours), torch.device("cpu"))
    listings = work.train, work.val

    def run() -> None:
        for listing in listings:
            encode = lambda x: {"features": work.encode(x)}
            passes.features(encode, listing, listing.kept, work.view, work.cfg.data, work.device)

    return run


PARTS: dict[str, Callable[[Path, Sizes, int], Any]] = {
    "linear": linear,
    "knn": knn,
    "ridge": ridge,
    "all": whole,
}


def summary(samples: dict[str, Any], sizes: Sizes) -> list[dict]:
    """The rows; of a part that was not measured, without a value."""
    rows, at = [], f"{sizes.pixels} px"
    for i, arch in enumerate(sizes.students):
        times = samples.get("linear", {}).get(arch, {})
        arms = times.get(str(sizes.heads), []), times.get("1", [])
        what = f"time of {sizes.heads} heads over that of 1, {arch} at {at}"
        rows += _ratio("linear_64_heads_cost" + f"_{arch}" * (i > 0), *arms, what, 1.15)
    searched, solved = samples.get("knn", {}), samples.get("ridge", {})
    what = f"{sizes.queries} queries among {sizes.bank}, {sizes.width} features"
    rows += _seconds("knn_50k", searched.get("times", []), what, 60)
    gib, unit = searched.get("gib"), "GiB at the peak, beside the features themselves"
    value = None if gib is None else round(gib, 3)
    rows.append(row("knn_50k_gib", value, unit, 2, "lower", None if searched else "not run"))
    what = f"{sizes.bank} images, {sizes.width} features, {sizes.penalties} penalties"
    rows += _seconds("ridge_50k", solved.get("times", []), what, 10)
    both = samples.get("all", {})
    arms = both.get("all", []), both.get("pass", [])
    what = f"time of {CACHED.replace(',', ', ')} over one bare pass, {sizes.students[0]} at {at}"
    return rows + _ratio("eval_all_over_one_pass", *arms, what, 1.3)


def _ratio(name: str, first: list[Times], second: list[Times], unit: str, aim: float) -> list[dict]:
    """By the clock and, without an aim, by the process's own time."""
    named = {name: (0, aim), f"{name}_cpu_time": (1, None)}
    if not first:
        return [row(n, None, unit, a, "lower", "not run") for n, (_, a) in named.items()]
    ratios = lambda clock: [a[clock] / b[clock] for a, b in zip(first, second)]
    return [row_of_rounds(n, ratios(i), 3, unit, a, "lower") for n, (i, a) in named.items()]


def _seconds(name: str, times: list[Times], what: str, aim: float) -> list[dict]:
    """The fastest round, for whatever else runs on a machine only adds; and the median of the
    process's own time."""
    unit, cpu = f"s, {what}; the fastest round", f"s on all cores together, {what}; median"
    names = f"{name}_seconds", f"{name}_cpu_time"
    if not times:
        reason = "not run"
        units = (names[0], unit, aim), (names[1], cpu, None)
        return [row(n, None, u, a, "lower", reason) for n, u, a in units]
    walls, own = zip(*times)
    return [
        row(names[0], round(min(walls), 2), unit, aim, "lower"),
        row(names[1], round(statistics.median(own), 2), cpu, None, "lower"),
    ]


if __name__ == "__main__":
    main()
