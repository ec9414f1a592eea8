"""What collectives take: bytes over bandwidth, and a latency for each step of their algorithm.

The latencies are counted as NCCL's own tuning counts them (src/graph/tuning.cc): a ring has n - 1
steps around, of which one per node crosses to the next node; a tree is a chain within a node and a
binary tree over the nodes."""

import math
from typing import NamedTuple


class Steps(NamedTuple):
    """Seconds of latency of an algorithm: once, and for a step within a node and between nodes."""

    base: float
    inside: float
    outside: float


class Link(NamedTuple):
    """What joins the ranks.

    per_node  ranks of a node
    inside    bytes/s that a rank sends to another of its node
    outside   bytes/s that a node sends to others, over all its adapters"""

    per_node: int
    inside: float
    outside: float
    ring: Steps
    tree: Steps

    def nodes(self, n: int) -> int:
        return math.ceil(n / self.per_node)

    def bandwidth(self, n: int) -> float:
        """Bytes/s through each rank of a ring: a ring for each adapter runs through all ranks, so
        that together they use a node's adapters, and within the node each rank's own link."""
        return self.inside if n <= self.per_node else min(self.inside, self.outside)

    def all_reduce(self, n: int, size: float) -> float:
        """Seconds to sum `size` bytes over n ranks, by the faster of ring and tree."""
        return min(ring_all_reduce(self, n, size), tree_all_reduce(self, n, size))

    def all_gather(self, n: int, size: float) -> float:
        """Seconds until each of n ranks has the `size` bytes of every rank, by a ring."""
        if n == 1:
            return 0.0
        return (n - 1) * size / self.bandwidth(n) + self.around(n, 1)

    def around(self, n: int, times: int) -> float:
        """Latency of a ring that is gone round so many times."""
        between = self.nodes(n) if n > self.per_node else 0
        steps = max(0, n - 1 - between) * self.ring.inside + between * self.ring.outside
        return self.ring.base + times * steps


def ring_all_reduce(link: Link, n: int, size: float) -> float:
    """2 (n-1)/n of the bytes through each link, and twice round: reduce, then hand out."""
    if n == 1:
        return 0.0
    return 2 * (n - 1) / n * size / link.bandwidth(n) + link.around(n, 2)


def tree_all_reduce(link: Link, n: int, size: float) -> float:
    """Every rank sends and receives all bytes twice (up, down), in 2 log2(nodes) steps.  Of the two
    binary trees that NCCL runs, each carries half; together they fill the links."""
    if n == 1:
        return 0.0
    nodes, within = link.nodes(n), min(n, link.per_node)
    deep = (within - 1) * link.tree.inside + math.ceil(math.log2(nodes)) * link.tree.outside
    return 2 * size / link.bandwidth(n) + link.tree.base + 2 * deep
