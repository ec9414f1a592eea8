"""Looks at a machine, or at several, before a training, and says what to mend."""

import argparse
import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastdisco.commands import arguments
from fastdisco.common import launch

if TYPE_CHECKING:
    from fastdisco.commands.trial import Wanted
    from fastdisco.config import Config
    from fastdisco.doctor.disk import Writing
    from fastdisco.doctor.finding import Report
    from fastdisco.doctor.meeting import Deadline, Meeting
    from fastdisco.doctor.ranks import Nodes

COMMANDS = {"": "check this machine, or several, before a training; exit code 2 if one would fail"}
# Sent where there is no configuration, bytes: the gradients of a MobileNetV3-Large with its head,
# and 64 keys of 128 numbers.
_GRADIENTS, _KEYS = 4 * 7_000_000, 4 * 64 * 128
_RUNNING = "  (steps of the training run now)"
_NO_LINKS = "one rank; start `fastdisco doctor` under torchrun or with --nodes to measure links"


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastdisco doctor`."""
    parser.add_argument("--config", help="of the training; without it, what every training needs")
    parser.add_argument(
        "--nodes",
        type=Path,
        metavar="HOSTFILE",
        help="check all nodes of DeepSpeed's hostfile by ssh; no training steps are run",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    parser.add_argument(
        "--quick", action="store_true", help="measure nothing: some seconds, as a health check"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=30,
        metavar="SECONDS",
        help="in which several ranks check each other (%(default)s)",
    )
    # The node's name in the hostfile; with it no steps are run.
    parser.add_argument("--as", dest="name", help=argparse.SUPPRESS)
    arguments.launched(parser)
    arguments.overrides(parser, "those of the training, with --config")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """`fastdisco doctor`; returns 2 where a training would fail, else 0."""
    if args.overrides and not args.config:
        args.parser.error("block.key=value needs --config")
    if args.limit <= 0:
        args.parser.error("--limit must be above 0")
    # Read when torch is imported: what fails between the ranks is said by us.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if args.nodes:
        return _over_nodes(args)
    launch.defaults()
    from fastdisco import config
    from fastdisco.doctor.finding import Report

    cfg = config.load(args.config, args.overrides) if args.config else None
    report = Report(args.json)
    if launch.world() == 1:
        return _one(args, cfg, report)
    launch.follow()
    return _several(args, cfg, report)


# ---- one process


def _one(args: argparse.Namespace, cfg: "Config | None", report: "Report") -> int:
    from fastdisco.commands import trial
    from fastdisco.doctor import node
    from fastdisco.doctor.finding import skipped

    wanted = trial.wanted(cfg, 1, look=not args.quick)
    for section, findings in node.checks(wanted.needs, args.quick).items():
        report.add(section, findings)
    if cfg is None:
        report.add("network", [skipped("ranks", _NO_LINKS)])
        return report.end()
    with _scratch(cfg) as folder:
        finding, writing = node.writing(wanted.needs, folder or cfg.run.out, False, args.quick)
        report.add("disk", [finding])
        report.add("network", [skipped("ranks", _NO_LINKS)])
        if args.quick:
            report.add("training", [wanted.refused] if wanted.refused else [])
        elif trial.ready(wanted, report) and folder:
            report.say(_RUNNING)
            code, said = trial.steps(cfg, folder, None)
            _judge(wanted, report, folder, {0: (code, said)}, {0: ""}, writing, None)
    return report.end()


def _judge(
    wanted: "Wanted",
    report: "Report",
    folder: Path,
    ended: dict[int, tuple[int, str]],
    where: dict[int, str],
    writing: "Writing | None",
    average_s: float | None,
) -> None:
    """Reports how the steps ended on each rank and, if well, what they measured."""
    from fastdisco.commands import trial
    from fastdisco.doctor import training

    bad = [r for r, (code, _) in ended.items() if code]
    # All ranks end with the code of one: the one that says why counts.
    rank = next((r for r in bad if "error: " in ended[r][1]), bad[0] if bad else 0)
    report.add(
        "training", [training.ended(*ended[rank])._replace(where=where[rank] if bad else "")]
    )
    if not bad:
        trial.judged(wanted, report, folder, writing, average_s)


@contextlib.contextmanager
def _scratch(cfg: "Config") -> Iterator[Path | None]:
    """A folder for what the doctor writes, on the disk of the run; None where none can be made."""
    from fastdisco.doctor import disk

    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(disk.scratch(cfg.run.out))
        except OSError:
            made = None
        yield made


# ---- several ranks


def _several(args: argparse.Namespace, cfg: "Config | None", report: "Report") -> int:
    """This rank's part under a launcher; rank 0 reports for all."""
    from fastdisco.doctor import meeting, ranks

    def expired(phase: str) -> None:
        report.add("network", [ranks.hung(phase, args.limit)])
        _end(report)

    node = meeting.here(args.name)
    deadline = meeting.Deadline(args.limit, expired)
    reached = meeting.reach(args.limit / 3)
    if reached.level == "failure":
        return _complain(node, f"{reached.found}; {reached.remedy}")
    try:
        meet = meeting.join(node, args.limit / 3)
    except RuntimeError as e:
        return _complain(node, str(ranks.broke("meeting", e).found))
    try:
        _together(args, cfg, report, meet, deadline)
    except ranks.Broken:
        pass
    except (RuntimeError, OSError) as e:
        report.add("network", [ranks.broke(deadline.phase, e)])
    deadline.over()
    code = _end(report)
    with contextlib.suppress(RuntimeError):
        code = meet.tell("code", code, wait_s=args.limit)
    ranks.leave(meet)
    return code


def _together(
    args: argparse.Namespace,
    cfg: "Config | None",
    report: "Report",
    meet: "Meeting",
    deadline: "Deadline",
) -> None:
    """The ranks' checks in their order; every rank calls it."""
    from fastdisco.commands import trial
    from fastdisco.common import dist
    from fastdisco.doctor import gpu, node, ranks
    from fastdisco.run import agreement

    short = args.quick or args.name is not None
    # To look for the images may take longer than the limit.
    wanted = trial.wanted(cfg, _several_nodes(), look=False)
    first = launch.local_rank() == 0
    deadline.phase = "the checks of this node"
    # Each rank looks at its own device.
    sections = node.checks(wanted.needs, quick=True) if first else {}
    own = None if args.quick else gpu.usable()
    bad = own if own and own.level == "failure" else None
    same = agreement.settings(cfg)
    nodes = ranks.gather(meet, deadline, report, same, sections, bad)
    if short and wanted.refused:
        report.add("training", [wanted.refused])
    ranks.reach_each_other(meet, deadline, report, nodes)
    with contextlib.ExitStack() as stack:
        folder = _shared(stack, cfg, report, meet, deadline, nodes) if cfg else None
        writing = None
        if cfg and meet.rank == 0:
            where = folder or cfg.run.out
            finding, writing = node.writing(wanted.needs, where, short, args.quick)
            report.add("disk", [finding])
        if args.quick:
            return
        sent = ranks.Sent(_GRADIENTS, _KEYS)
        if wanted.sizes:
            sent = ranks.Sent(wanted.sizes.gradients, wanted.sizes.keys)
        average_s = ranks.measure(meet, deadline, report, nodes, dist.device(), sent)
        if not short and folder:
            deadline.over()
            _steps(wanted, report, meet, nodes, folder, writing, average_s)


def _steps(
    wanted: "Wanted",
    report: "Report",
    meet: "Meeting",
    nodes: "Nodes",
    folder: Path,
    writing: "Writing | None",
    average_s: float,
) -> None:
    """What depends on the images, plan and teacher on rank 0, then real steps on all."""
    from fastdisco.commands import trial
    from fastdisco.doctor import node

    port = None
    if meet.rank == 0:
        wanted = trial.wanted(wanted.cfg, wanted.needs.nodes, look=True)
        report.add("machine", node.tars(wanted.needs))
        report.add("disk", node.recorded(wanted.needs))
    if meet.rank == 0 and trial.ready(wanted, report):
        report.say(_RUNNING)
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
    port = meet.tell("port", port)
    if port is None:
        return
    assert wanted.cfg
    ended = meet.gather("steps", trial.steps(wanted.cfg, folder, port), wait_s=1e6)
    if ended is not None:
        told = {r: (code, said) for r, (code, said) in ended.items()}
        _judge(wanted, report, folder, told, nodes.of, writing, average_s)


def _shared(
    stack: contextlib.ExitStack,
    cfg: "Config",
    report: "Report",
    meet: "Meeting",
    deadline: "Deadline",
    nodes: "Nodes",
) -> Path | None:
    """The scratch folder of all ranks, which rank 0 makes; None where a rank does not see it."""
    from fastdisco.doctor import ranks

    made = stack.enter_context(_scratch(cfg)) if meet.rank == 0 else None
    return ranks.share_a_folder(meet, deadline, report, nodes, made, cfg.run.out)


def _several_nodes() -> int:
    """2 where ranks of other machines are known to take part: then addresses must serve them."""
    from fastdisco.commands import trial

    return 1 if trial.ranks_here() == launch.world() else 2


def _end(report: "Report") -> int:
    """Rank 0 prints the report; the exit code, elsewhere that of what this rank has found."""
    return report.end() if launch.rank() == 0 else report.code()


def _complain(node: str, text: str) -> int:
    """Of a rank that cannot tell rank 0."""
    print(f"fastdisco doctor: rank {launch.rank()} on {node}: {text}", file=sys.stderr, flush=True)
    return 2


# ---- the nodes of a hostfile


def _over_nodes(args: argparse.Namespace) -> int:
    """Starts the ranks on all nodes and reports for them."""
    from fastdisco.doctor import nodes
    from fastdisco.doctor.finding import Finding, Report, skipped

    hosts = nodes.read(args.nodes)
    begin = time.monotonic()
    lost = nodes.unreached(hosts)
    reached = {host: slots for host, slots in hosts.items() if host not in lost}
    # Without a node the others are fewer ranks than the configuration is meant for.
    whole = [*(["--config", args.config] if args.config else []), *args.overrides]
    limit = max(1.0, args.limit - (time.monotonic() - begin))
    passed = [
        f"--limit={limit:.3g}",
        *(["--quick"] if args.quick else []),
        *([] if lost else whole),
    ]
    # From here on this process is no rank, and prints.
    at = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
    launch.alone()
    os.environ.update({name: value for name, value in at.items() if value})
    ended = nodes.run(reached, passed, limit) | lost
    told, report = nodes.report(ended), Report(args.json)
    for row in told["findings"] if told else ():
        section = row.pop("section")
        report.add(section, [Finding(**row)])
    if lost and args.config:
        why = "not looked at: a node is missing, and with it ranks that the configuration counts"
        report.add("training", [skipped("configuration", why)])
    report.add("nodes", nodes.silent(ended, told is not None))
    return report.end()
