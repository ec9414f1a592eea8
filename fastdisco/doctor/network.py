"""What the ranks find of each other: versions, clocks, round trips, bandwidth, the slowest.

The measurements are collectives of all ranks; the functions that judge get numbers."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as td

from fastdisco.common import dist
from fastdisco.doctor.finding import Finding, failure, ok, skipped, warning
from fastdisco.doctor.meeting import Meeting

MIB = 2**20
# Seconds: a round trip within one network takes less, and what depends on clocks is a second apart.
_SLOW_TRIP, _SKEW = 5e-3, 1.0
# Bytes a second of Ethernet with 1 Gbit/s, which is slow between nodes.
_SLOW_LINK = 125e6
# How much slower than the median a rank or a node is named.
_SLOWER = 1.5
# Pings of a rank at most, and seconds for them; bytes from node to node.
_PINGS, _PING_S, _PIECE = 10, 1.0, MIB
# Seconds that a collective may be estimated to take and is still measured at its full size.
_BUDGET = 3.0


class Link(NamedTuple):
    """What rank 0 measures of another rank."""

    trip: float  # seconds, of the quickest round trip
    skew: float  # seconds by which its clock is ahead of rank 0's
    rate: float  # bytes a second to it or from it, whichever is slower


class Collective(NamedTuple):
    """A collective at the size that training has."""

    seconds: float
    size: int  # bytes that each rank puts in
    measured: int  # bytes that were sent: fewer where the link is too slow for all


# ---- what ranks tell


def came(nodes: dict[int, str], world: int, wait_s: float) -> Finding:
    """All ranks came to rank 0.  nodes: by rank, of those that came."""
    lacking = [r for r in range(world) if r not in nodes]
    if not lacking:
        return ok("ranks", f"{world} ranks on {len(set(nodes.values()))} nodes")
    ranks = f"rank{'s' * (len(lacking) > 1)} {_ranges(lacking)}"
    there = ", ".join(dict.fromkeys(nodes.values()))
    what = f"{ranks} did not come within {wait_s:.0f} s; came: {there}"
    return failure("ranks", what, "look at what the command says on the other nodes")


def connected(errors: dict[str, dict[str, str]]) -> Finding:
    """Each node reaches each other one, not only rank 0's.  errors: from node to node."""
    for node, others in errors.items():
        for other, error in others.items():
            what = f"{node} cannot reach {other} ({error})"
            remedy = "open all ports between the nodes, or set GLOO_SOCKET_IFNAME to their network"
            return failure("links", what, remedy)
    return ok("links", f"{len(errors)} nodes reach each other")


def agreed(facts: dict[int, dict[str, str]], nodes: dict[int, str]) -> Finding:
    """All ranks have the same versions and the same configuration as rank 0."""
    first = facts[0]
    for rank, other in facts.items():
        for key in sorted(first | other):
            if (has := other.get(key)) != (wants := first.get(key)):
                what = f"{key}: rank {rank} on {nodes[rank]} has {has}, rank 0 on {nodes[0]} has"
                return failure("same everywhere", f"{what} {wants}", "give all ranks the same")
    return ok("same everywhere", f"{len(first)} versions and settings")


def clocks(links: dict[int, Link], nodes: dict[int, str]) -> Finding:
    """The nodes' clocks agree."""
    rank = max(links, key=lambda r: abs(links[r].skew))
    skew = links[rank].skew
    found = f"{nodes[rank]} is {abs(skew):.3g} s {'ahead of' if skew > 0 else 'behind'} {nodes[0]}"
    if abs(skew) > _SKEW:
        remedy = "set the clocks by NTP: times of files and logs, and keys of object stores, depend"
        return warning("clocks", found, f"{remedy} on them")
    return ok("clocks", found)


def round_trip(links: dict[int, Link], nodes: dict[int, str], slow: float = _SLOW_TRIP) -> Finding:
    """The slowest round trip from host to host, by gloo, with rank 0.  slow: seconds that warn."""
    rank = max(links, key=lambda r: links[r].trip)
    found = f"{links[rank].trip * 1e3:.2g} ms to the slowest, rank {rank} on {nodes[rank]}"
    if links[rank].trip > slow:
        remedy = f"look at the network of {nodes[rank]}: a long or busy way, or the wrong interface"
        return warning("round trip", found, f"{remedy} (GLOO_SOCKET_IFNAME)")
    return ok("round trip", found)


def bandwidth(links: dict[int, Link], nodes: dict[int, str]) -> Finding:
    """The slowest link between rank 0's node and another node."""
    others = {r: link for r, link in links.items() if nodes[r] != nodes[0]}
    if not others:
        return skipped("links' speed", "one node")
    rank = min(others, key=lambda r: others[r].rate)
    least, usual = others[rank].rate, statistics.median(link.rate for link in others.values())
    found = f"{least / 1e6:.0f} MB/s to the slowest node, {nodes[rank]}"
    remedy = f"look at the network of {nodes[rank]}: cable, switch, interface"
    if least < usual / _SLOWER:
        found += f"; {usual / 1e6:.0f} to the others"
        return warning("links' speed", found, remedy)
    if least < _SLOW_LINK:
        return warning("links' speed", f"{found}: as slow as 1 Gbit/s", remedy)
    return ok("links' speed", found)


def slowest(seconds: dict[int, float], nodes: dict[int, str]) -> Finding:
    """The rank whose device computes the slowest: all others wait for it in every step.

    seconds: by rank, of the same work"""
    rank = max(seconds, key=lambda r: seconds[r])
    usual = statistics.median(seconds.values())
    factor = seconds[rank] / usual
    found = f"rank {rank} on {nodes[rank]} computes {factor:.2f} times as long as the median"
    if factor > _SLOWER:
        remedy = "see which other programs, which clock rate and which temperature its device has"
        return warning("slowest rank", found, remedy)
    return ok("slowest rank", found)


def exchange(check: str, measured: Collective, ranks: int, what: str) -> Finding:
    """What a collective takes, for the reader; `training.exchange_share` judges it."""
    found = f"{what}: {measured.size / MIB:.1f} MiB in {measured.seconds * 1e3:.3g} ms"
    found += f" on {ranks} ranks, {measured.size / measured.seconds / 1e6:.3g} MB/s"
    if measured.measured < measured.size:
        piece = measured.measured / MIB
        return warning(
            check,
            f"{found} (by {piece:.1f} MiB of it: the link is too slow for all)",
            "see the links' speed above, or raise data.accumulate so that ranks exchange less often",
        )
    return ok(check, found)


# ---- measuring: called by every rank


def measure_links(meeting: Meeting, first: list[int]) -> dict[int, Link]:
    """On rank 0 what it measures of each other rank, by messages between the hosts.

    first: ranks that are the first of their node, to which a larger piece is sent"""
    if meeting.rank:
        _answer(meeting.rank in first)
        return {}
    return {rank: _ping(rank, rank in first) for rank in range(1, meeting.world)}


def _ping(rank: int, piece: bool) -> Link:
    """Rank 0's side: asks for the time until it has asked often enough."""
    trips, skews, begun = [], [], time.perf_counter()
    ask, told = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    while len(trips) < _PINGS and (not trips or time.perf_counter() - begun < _PING_S):
        before, began = time.time(), time.perf_counter()
        td.send(ask, rank)
        td.recv(told, rank)
        trips.append(time.perf_counter() - began)
        # Its clock was read in the middle of the trip, as NTP takes it.
        skews.append(told.item() - (before + trips[-1] / 2))
    td.send(torch.zeros_like(ask), rank)
    trip, skew = min(zip(trips, skews))
    return Link(trip, skew, _push(rank) if piece else 0.0)


def _push(rank: int) -> float:
    """Bytes a second of a piece to another rank and of one from it, of which the slower counts."""
    data, told = torch.zeros(_PIECE, dtype=torch.uint8), torch.zeros(1)
    there, back = [], []
    for _ in range(2):
        began = time.perf_counter()
        td.send(data, rank)
        td.recv(told, rank)
        arrived = time.perf_counter()
        td.recv(data, rank)
        there.append(arrived - began)
        back.append(time.perf_counter() - arrived)
    return _PIECE / max(min(there), min(back))


def _answer(piece: bool) -> None:
    """The other side of `_ping`."""
    ask = torch.ones(1, dtype=torch.float64)
    while True:
        td.recv(ask, 0)
        if not ask.item():
            break
        td.send(torch.tensor([time.time()], dtype=torch.float64), 0)
    if piece:
        data = torch.empty(_PIECE, dtype=torch.uint8)
        for _ in range(2):
            td.recv(data, 0)
            td.send(torch.ones(1), 0)
            td.send(data, 0)


def all_reduce(size: int, device: torch.device) -> Collective:
    """Seconds of an average of so many bytes over all ranks, as gradients are averaged."""
    return _sized(size, device, lambda x: dist.all_mean(x))


def all_gather(size: int, device: torch.device) -> Collective:
    """Seconds of gathering so many bytes from each rank, as keys are gathered."""
    return _sized(size, device, lambda x: dist.all_gather(x))


def device_trip(device: torch.device) -> float:
    """Seconds of the smallest collective between the devices (NCCL on GPUs)."""
    x = torch.zeros(1, device=device)
    return min(_timed(lambda: dist.all_sum(x), device) for _ in range(_PINGS))


def work(device: torch.device) -> float:
    """Seconds of some products of matrices on this rank's device, the quickest of several."""
    n = 4096 if device.type == "cuda" else 512
    x = torch.ones(n, n, device=device)
    x @ x
    return min(_timed(lambda: x @ x, device) for _ in range(5))


def _sized(size: int, device: torch.device, run: Callable[[torch.Tensor], Any]) -> Collective:
    """A piece first: where all would take too long, its time stands for the whole."""
    piece = min(size, MIB)
    x = torch.zeros(max(1, piece // 4), device=device)
    run(x)
    took = _slowest_of(_timed(lambda: run(x), device), device)
    if took * size / piece > _BUDGET:
        return Collective(took * size / piece, size, piece)
    x = torch.zeros(max(1, size // 4), device=device)
    run(x)
    took = min(_slowest_of(_timed(lambda: run(x), device), device) for _ in range(3))
    return Collective(took, size, size)


def _slowest_of(seconds: float, device: torch.device) -> float:
    """The largest of the ranks' times, the same on every rank."""
    x = torch.tensor(seconds, dtype=torch.float64, device=device)
    td.all_reduce(x, op=td.ReduceOp.MAX)
    return float(x)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def _ranges(numbers: list[int]) -> str:
    """2, 3, 4, 7 -> 2-4, 7"""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
