"""Evaluates a network: a run's, a teacher's, or timm's."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdisco.commands import arguments
from fastdisco.common import launch
from fastdisco.common.console import say
from fastdisco.common.errors import UserError

if TYPE_CHECKING:
    from fastdisco.commands.measure import Work
    from fastdisco.commands.networks import Network
    from fastdisco.evals.results import Result
    from fastdisco.evals.settings import Settings
    from fastdisco.run.signals import Stop

# In the order in which `all` does them.
COMMANDS = {
    "knn": "accuracy by nearest neighbours, for several k and temperatures",
    "retrieve": "recall at 1, 5, 10 and mean average precision among the validation images",
    "health": "spread and rank of the features, and how near they are to the teacher's",
    "tsne": "a map of some classes in two dimensions, several networks side by side",
    "probe": "ridge, logistic regression and SGD on features computed once",
    "semi": "a linear classifier on one and on ten percent of the labels",
    "transfer": "a linear classifier on another data set",
    "linear": "a linear classifier by a published protocol, on random crops",
    "embed": "write features and embeddings of a set of images",
    "all": "everything above that the data allow, from one pass over each split",
    "table": "results of runs side by side",
}
# What `all` does without being told more.
USUAL = ("knn", "retrieve", "health", "tsne", "probe", "semi", "transfer", "linear")


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco eval`."""
    sub = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    for name, what in COMMANDS.items():
        if name != "table":
            _add_measure(arguments.command(sub, name, what, measure), name)
    p = arguments.command(sub, "table", COMMANDS["table"], table)
    p.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="runs, folders of results, or a result's JSON",
    )
    p.add_argument("--versus", type=Path, metavar="RUN", help="paired differences to this one")
    p.add_argument("--format", choices=("text", "csv", "markdown"), default="text")
    p.add_argument(
        "--rows", choices=("networks", "values"), default="values", help="what stands in rows"
    )
    p.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these values")


def _add_measure(p: argparse.ArgumentParser, name: str) -> None:
    p.add_argument(
        "network",
        metavar="NET",
        # Several are shown side by side.
        nargs="+" if name == "tsne" else None,
        help="a run's folder, one of its checkpoints/step_XXXXXXXX, a teacher's file, an exported "
        "ONNX file, or timm:NAME",
    )
    arguments.of_network(p)
    p.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the results; by default the run's eval/"
    )
    if name in ("all", "semi"):
        p.add_argument(
            "--tries", type=int, metavar="N", help="draws of each share of the labels: semi.tries"
        )
        p.add_argument(
            "--finetune", action="store_true", help="train the backbone, too: semi.finetune=true"
        )
    if name == "all":
        usual = ",".join(USUAL)
        p.add_argument("--only", metavar="WHAT,...", help=f"of {usual}; without it all of them")
    arguments.launched(p)
    arguments.overrides(p, "for example data.val=/data/other knn.k=[20,200] linear.preset=swav")
    p.set_defaults(what=name)


def measure(args: argparse.Namespace) -> int:
    """One evaluation or all of them; the last line on stdout is a JSON of every value."""
    from fastdisco.evals import results, settings

    launch.defaults()
    nets = [args.network]
    if args.what == "tsne":
        nets, args.overrides = arguments.parted([*args.network, *args.overrides])
    theirs, ours = settings.split(args.overrides)
    wanted = settings.load([*ours, *_options(args)])
    if args.what == "embed" and wanted.embed.data and not _has_val(theirs):
        theirs.append(f"data.val={wanted.embed.data}")

    from fastdisco import engine
    from fastdisco.commands import measure as measures
    from fastdisco.commands import networks
    from fastdisco.common import dist
    from fastdisco.run import agreement

    shown, network = networks.read_all(args, nets, theirs)
    settings.check(wanted, network.cfg.data.eval_size, network.cfg.data.eval_resize)
    several = launch.world() > 1
    device = engine.start(network.cfg.engine) if several else dist.device()
    # Where one rank refuses, all end with its code.
    with _stoppable() as stop, agreement.together():
        for each in shown:
            results.refuse_unwritable(each.folder)
        work = measures.Work(network, wanted, device, stop)
        work.in_parts = args.what in ("all", "semi")
        if len(shown) > 1:
            work.shown = [work if n is network else work.beside(n) for n in shown]
        names = _names(nets, shown, wanted)
        try:
            found = _each(work, _chosen(args, wanted), strict=args.what != "all", names=names)
            work.end()
        except measures.Stopped:
            say("stopped as asked; the same command continues from there")
            return launch.STOPPED
    if several:
        engine.stop()
    if launch.rank() == 0:
        print(json.dumps(_values(names, found)), flush=True)
    return 0


def _values(names: list[str], found: list["Result"]) -> dict[str, float]:
    """Of every result, by names that say which; names: as of `_names`."""
    out = {}
    for name, result in zip(names or [""] * len(found), found):
        place = f"eval/{name}/" if name else "eval/"
        out |= {place + result.named(k): v for k, v in result.values.items()}
    return out


def _options(args: argparse.Namespace) -> list[str]:
    """Those of `semi`, as overrides."""
    tries, finetune = getattr(args, "tries", None), getattr(args, "finetune", False)
    return [f"semi.tries={tries}"] * (tries is not None) + ["semi.finetune=true"] * finetune


def _has_val(overrides: list[str]) -> bool:
    return any(o.startswith("data.val=") for o in overrides)


@contextmanager
def _stoppable() -> Iterator["Stop"]:
    """SIGTERM and Ctrl-C are heard inside, and mean what they meant before outside."""
    from fastdisco.run.signals import SIGNALS, Stop

    before = {s: signal.getsignal(s) for s in SIGNALS}
    try:
        yield Stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _chosen(args: argparse.Namespace, wanted: "Settings") -> list[str]:
    if args.what != "all":
        return [args.what]
    # Another data set is measured where one is given.
    usual = [c for c in USUAL if c != "transfer" or wanted.transfer.train]
    chosen = args.only.split(",") if args.only else usual
    if strange := [c for c in chosen if c not in USUAL]:
        raise UserError(f"--only: {strange[0]} is none of {', '.join(USUAL)}")
    # Where all training images are needed at all, the first pass over them serves everyone.
    return sorted(chosen, key=lambda c: (c != "probe", USUAL.index(c)))


def _names(nets: list[str], shown: list["Network"], wanted: "Settings") -> list[str]:
    """Of networks side by side, each with a name of its own; [] of one network alone."""
    if len(shown) == 1:
        return []
    titles = list(wanted.tsne.titles)
    names = titles + [n.name for n in shown[len(titles) :]]
    return names if len(set(names)) == len(names) else nets


def _each(work: "Work", chosen: list[str], strict: bool, names: list[str]) -> list["Result"]:
    """strict: what the data do not allow is refused, else said.  names: of networks side by side."""
    from fastdisco.commands import measure as measures
    from fastdisco.evals import results

    out: list[Result] = []
    lacking: UserError | None = None
    for what in chosen:
        begin = time.perf_counter()
        try:
            found = _functions()[what](work)
        except UserError as e:
            if strict:
                raise
            say(f"{what}: left out: {e}")
            lacking = e
            continue
        out += found if isinstance(found, list) else [found]
        if not strict:
            say(f"{what}: {time.perf_counter() - begin:.1f} s")
    if lacking and not out:
        raise lacking
    if strict:
        for name, result in zip(names or [""] * len(out), out):
            say(f"{name}: {measures.summary(result)}" if name else measures.summary(result))
    else:
        say(results.text(results.overview(out)))
    say(f"results in {work.network.folder}")
    return out


def _functions() -> dict[str, Callable[["Work"], Any]]:
    from fastdisco.commands import embed, heads, health, tsne
    from fastdisco.commands import measure as measures

    return {
        "knn": measures.knn,
        "retrieve": measures.retrieval,
        "health": health.run,
        "embed": embed.run,
        "tsne": tsne.run,
        "probe": heads.probe,
        "semi": heads.semi,
        "transfer": heads.transfer,
        "linear": heads.linear,
    }


def table(args: argparse.Namespace) -> None:
    """Results side by side, or paired differences to one run."""
    from fastdisco.commands import measure as measures
    from fastdisco.evals import results

    write = {"text": results.text, "csv": results.as_csv, "markdown": results.markdown}
    if args.versus:
        if args.rows == "networks":
            raise UserError("--rows: belongs to the table without --versus; leave it out")
        beside = _results(args.versus)
        found = {run: results.versus(_results(run), beside, args.only) for run in args.runs}
        if args.format != "text":
            named = {_name(run, args.runs): pairs for run, pairs in found.items()}
            print(write[args.format](results.differences(named, _name(args.versus, [args.versus]))))
            return
        for run, pairs in found.items():
            print(f"{run} versus {args.versus}")
            print("\n".join(f"  {line}" for line in measures.pairs(pairs)))
        return
    shown = results.table({_name(run, args.runs): _results(run) for run in args.runs}, args.only)
    if args.rows == "values":
        shown = results.turned(shown)
    print(write[args.format](shown))


def _results(run: Path) -> list["Result"]:
    from fastdisco.evals import results

    if run.is_file():
        return [results.read(run)]
    found, remarks = results.newest(run / "eval" if (run / "eval").is_dir() else run)
    for remark in remarks:
        # On stdout is the table, which another program may read.
        print(f"{run}: {remark}", file=sys.stderr)
    return found


def _name(run: Path, runs: list[Path]) -> str:
    names = [r.resolve().name for r in runs]
    return str(run) if names.count(run.resolve().name) > 1 else run.resolve().name
