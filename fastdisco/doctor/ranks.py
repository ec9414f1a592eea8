"""What several ranks do together, step by step; rank 0 reports."""

import contextlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as td

from fastdisco.common import launch
from fastdisco.doctor import disk, network
from fastdisco.doctor import meeting as doors
from fastdisco.doctor.finding import Finding, Report, failure, ok
from fastdisco.doctor.meeting import Deadline, Meeting
from fastdisco.doctor.node import Sections

# Seconds for what another host wrote to show in a shared folder, when little time is left.
_SHOWS = 5.0


class Sent(NamedTuple):
    """Bytes that a step sends: of gradients, and of one rank's keys."""

    gradients: int
    keys: int


class Nodes(NamedTuple):
    """Who is where; on every rank."""

    of: dict[int, str]  # the node of each rank
    first: list[int]  # the first rank of each node


class Broken(Exception):
    """The ranks cannot go on together; what is wrong has been reported."""


def gather(
    meeting: Meeting,
    deadline: Deadline,
    report: Report,
    own: dict[str, Any],
    sections: Sections,
    device: Finding | None,
) -> Nodes:
    """Every rank tells what it has and what its node's checks found; rank 0 reports it.

    own       what all ranks must have in common
    sections  the findings of this node, empty on ranks that are not its first
    device    why this rank's device cannot be used, if it cannot
    Raises Broken where a rank does not come, or the device of one cannot be used."""
    sent = {
        "node": meeting.node,
        "local": launch.local_rank(),
        "same": own,
        "device": device and device._asdict(),
        "sections": {name: [f._asdict() for f in held] for name, held in sections.items()},
    }
    deadline.phase = "meeting"
    wait_s = max(deadline.left() / 2, 1)
    found = meeting.gather("facts", sent, wait_s)
    if found is None:
        return _told(meeting, deadline)
    first = [r for r, x in found.items() if x["local"] == 0]
    nodes = _named({r: x["node"] for r, x in found.items()}, first)
    _report_nodes(report, found, nodes)
    came = network.came(nodes, meeting.world, wait_s)
    report.add("network", [came])
    if came.level != "failure":
        report.add("network", [network.agreed({r: x["same"] for r, x in found.items()}, nodes)])
    unusable = [
        Finding(**x["device"])._replace(where=f"rank {r} on {nodes[r]}")
        for r, x in found.items()
        if x["device"]
    ]
    report.add("machine", unusable)
    _go(meeting, None if unusable or len(found) < meeting.world else [nodes, first])
    return Nodes(nodes, first)


def reach_each_other(meeting: Meeting, deadline: Deadline, report: Report, nodes: Nodes) -> None:
    """Each node tries to reach each other one.  Raises Broken where one cannot."""
    if len(nodes.first) == 1:
        return
    deadline.phase = "reaching each other"
    mine = meeting.rank in nodes.first
    with contextlib.ExitStack() as stack:
        door: Any = None
        if mine:
            try:
                door = stack.enter_context(doors.open_door())
            except OSError as e:
                door = str(e)
        opened = meeting.gather("doors", door, deadline.left() / 2)
        if opened is not None:
            opened = {nodes.of[r]: x for r, x in opened.items() if x}
        opened = meeting.tell("doors", opened, deadline.left())
        errors = {}
        if mine:
            here = nodes.of[meeting.rank]
            others = {n: x for n, x in opened.items() if n != here}
            errors = {n: x for n, x in others.items() if isinstance(x, str)}
            errors |= doors.knock({n: x for n, x in others.items() if n not in errors})
        said = meeting.gather("knocks", errors, deadline.left() / 2)
        finding = None
        if said is not None:
            finding = network.connected({nodes.of[r]: said[r] for r in nodes.first if r in said})
            report.add("network", [finding])
        good = finding is not None and finding.level != "failure"
        if not meeting.tell("connected", good, deadline.left()):
            raise Broken


def share_a_folder(
    meeting: Meeting, deadline: Deadline, report: Report, nodes: Nodes, made: Path | None, run: Path
) -> Path | None:
    """All ranks look for the folder that rank 0 has made; returns it as this rank sees it.

    made  on rank 0, the new folder; None: it could not make one, then None is returned
    run   what the folder lies in, or would once that exists, on this rank"""
    deadline.phase = "looking for the shared folder"
    name = meeting.tell("scratch", made and made.name, deadline.left())
    if name is None:
        return None
    here = disk.existing(run) / name
    end = time.monotonic() + min(_SHOWS, deadline.left() / 4)
    while not (sees := here.is_dir()) and time.monotonic() < end:
        time.sleep(0.1)
    seen = meeting.gather("sees", [sees, str(here.parent)], deadline.left() / 2)
    if seen is not None:
        report.add("disk", [disk.shared([(nodes.of[r], *x) for r, x in seen.items()])])
    return here


def measure(
    meeting: Meeting,
    deadline: Deadline,
    report: Report,
    nodes: Nodes,
    device: torch.device,
    sent: Sent,
) -> float:
    """Joins the process group and measures; returns the seconds of an average of gradients."""
    deadline.phase = "joining the process group"
    doors.group(meeting, device)
    deadline.phase = "round trips between the hosts"
    links = network.measure_links(meeting, nodes.first)
    if links:
        judged = (network.round_trip, network.clocks, network.bandwidth)
        report.add("network", [judge(links, nodes.of) for judge in judged])
    deadline.phase = "the average of gradients"
    backend = "NCCL" if device.type == "cuda" else "gloo"
    trip = network.device_trip(device)
    average = network.all_reduce(sent.gradients, device)
    deadline.phase = "gathering keys"
    gathered = network.all_gather(sent.keys, device)
    deadline.phase = "the same work on all ranks"
    seconds = meeting.gather("work", network.work(device), deadline.left())
    if seconds is not None:
        what = (average, meeting.world, f"an average of gradients by {backend}")
        report.add(
            "network",
            [
                ok("collective", f"{trip * 1e3:.2g} ms for the smallest by {backend}"),
                network.exchange("all-reduce", *what),
                network.exchange("all-gather", gathered, meeting.world, "keys of one rank"),
                network.slowest(seconds, nodes.of),
            ],
        )
    return average.seconds


def leave(meeting: Meeting) -> None:
    """At the end of every rank."""
    if td.is_initialized():
        td.destroy_process_group()
    meeting.leave()


def hung(phase: str, limit_s: float) -> Finding:
    """What it means that the ranks did not end in time."""
    what = f"{phase}: not done within {limit_s:.0f} s"
    remedy = "a link or a rank hangs: see the findings above, NCCL_DEBUG=INFO, or raise --limit"
    return failure("time", what, remedy)


def broke(phase: str, error: BaseException) -> Finding:
    """What an error between the ranks means."""
    words = (str(error).splitlines() or [type(error).__name__])[0]
    remedy = "see the findings above, and what the command says on the other nodes"
    return failure("network", f"{phase}: {words}", remedy)


def _told(meeting: Meeting, deadline: Deadline) -> Nodes:
    """Of rank 0, who is where."""
    told = meeting.tell("nodes", wait_s=max(deadline.left(), 1))
    if told is None:
        raise Broken
    of, first = told
    return Nodes({int(r): name for r, name in of.items()}, first)


def _go(meeting: Meeting, value: Any) -> None:
    meeting.tell("nodes", value)
    if value is None:
        raise Broken


def _named(hosts: dict[int, str], first: list[int]) -> dict[int, str]:
    """A name for the node of each rank.  Nodes of one name are told apart by a number."""
    number, named = -1, {}
    for rank in sorted(hosts):
        number += rank in first
        named[rank] = number, hosts[rank]
    many = len(first) > 1 and len({hosts[r] for r in first}) < len(first)
    return {r: f"{host} (node {n})" if many else host for r, (n, host) in named.items()}


def _report_nodes(report: Report, found: dict[int, Any], nodes: dict[int, str]) -> None:
    """All findings of rank 0's node, and of the others what is not in order there."""
    several = len(set(nodes.values())) > 1
    for name in found.get(0, {}).get("sections", {}):
        for rank, sent in found.items():
            held = [Finding(**f) for f in sent["sections"].get(name, [])]
            if rank:
                held = [f for f in held if f.level in ("warning", "failure")]
            where = nodes[rank] if several else ""
            report.add(name, [f._replace(where=where) for f in held])
