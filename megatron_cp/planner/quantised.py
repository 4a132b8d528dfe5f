"""Count what quantised messages of replicas send over nodes, the seconds, and what they keep (arXiv:2306.10209).

A part is taken as whole blocks; in a run the last block of a matrix in a part is filled up. No kernel of these messages
has been timed on a GPU: the passes over memory around them are counted at the rate of copies.
"""

from functools import lru_cache
from math import ceil, log2
from typing import NamedTuple

from megatron_cp.hardware.cluster import Cluster, Collective
from megatron_cp.planner.parallel import Parallel
from megatron_cp.replicas import Quantisation
from megatron_cp.replicas.parts import places_of

BLOCKED = 12
"""Bytes of memory passes for a number's float32 copy among the blocks: cleared, written and read."""

LEFT = 2
"""Bytes of what is left over of a number, for the next step."""

TRAVEL = 8
"""Bytes beside each number of a bucket that travels, at most: a float32 copy, and messages sent and received."""


class ParameterKinds(NamedTuple):
    """Parameters of a rank.

    coded:   of matrices that are quantised
    exact:   of what is sent over nodes as it is
    experts: of those that other ranks share, and that travel as ever
    """

    coded: float
    exact: float
    experts: float

    @property
    def in_hops(self) -> float:
        """Parameters that are sent over nodes in two hops."""
        return self.coded + self.exact


class Moved(NamedTuple):
    """Bytes that a reduction or a gather moves.

    in_hops: over nodes, in two hops
    as_ever: around all replicas
    experts: around the replicas that hold the same experts
    """

    in_hops: float
    as_ever: float
    experts: float

    def plus(self, other: "Moved", times: float = 1.0) -> "Moved":
        return Moved(*(mine + times * more for mine, more in zip(self, other, strict=True)))


class NodeHop(NamedTuple):
    """One of the two hops: its ranks, and the share of a buffer that each sends inside its node and to others.

    last: rank farthest from the first, of all ranks of the run
    """

    ranks: int
    inside: float
    between: float
    last: int

    @property
    def share(self) -> float:
        """Share of a buffer that a rank has for all ranks of the hop."""
        return (self.inside + self.between) * self.ranks / (self.ranks - 1) if self.ranks > 1 else 0.0


def moved(quantisation: Quantisation | None, kinds: ParameterKinds, coded: float, exact: float) -> Moved:
    """Return what is moved of gradients or of weights.

    coded, exact: bytes of each parameter of a linear, and of any other, where it is not quantised
    """
    experts = coded * kinds.experts
    if quantisation is None:
        return Moved(0.0, coded * kinds.coded + exact * kinds.exact, experts)
    return Moved(quantisation.bytes * kinds.coded + exact * kinds.exact, 0.0, experts)


def node_hops(parallel: Parallel, cluster: Cluster) -> tuple[NodeHop, NodeHop]:
    """Return the hop inside the nodes that the messages know, and that between them."""
    per_node = parallel.messages.ranks_per_node or cluster.ranks_per_node
    return _hops(parallel.tp, parallel.shards, per_node, cluster.ranks_per_node)


@lru_cache(256)
def _hops(stride: int, shards: int, per_node: int, per_real_node: int) -> tuple[NodeHop, NodeHop]:
    """Return the hops among so many ranks, `stride` apart; the first rank stands for all."""
    places = places_of([stride * at // per_node for at in range(shards)])
    inside, between = ([stride * row[0] for row in places], [stride * rank for rank in places[0]])
    first, second = (
        NodeHop(
            ranks=len(ranks),
            inside=part * sum(rank < per_real_node for rank in ranks[1:]),
            between=part * sum(rank >= per_real_node for rank in ranks[1:]),
            last=ranks[-1],
        )
        # to a rank of the node go the parts of all at its place, to one at the own place its part alone
        for ranks, part in ((inside, 1 / len(inside)), (between, 1 / shards))
    )
    return first, second


def sent_in_hops(size: float, hops: tuple[NodeHop, NodeHop]) -> tuple[float, float]:
    """Return the bytes that each rank sends inside its node, and to others, to reduce or to gather `size` bytes."""
    return size * sum(hop.inside for hop in hops), size * sum(hop.between for hop in hops)


def reduce_seconds(parallel: Parallel, cluster: Cluster, kinds: ParameterKinds, size: float) -> float:
    """Return the seconds of a reduction of `size` bytes in two hops, and of the passes over memory around them."""
    quantisation, hops = parallel.messages.of_gradients, node_hops(parallel, cluster)
    assert quantisation is not None
    # what was left over is read, and what is left over now is written
    left = 2 * LEFT if quantisation.keeps else 0
    # gradients are read in float32; then codes are written and read, and sums written, for the next hop to read
    touched = 4 + BLOCKED + sum(hop.share * (2 * quantisation.bytes + left + 8 / hop.ranks) for hop in hops)
    return kinds.in_hops * touched / cluster.touch_bytes_per_s + _sent_seconds(cluster, "scatter", size, hops)


def gather_seconds(parallel: Parallel, cluster: Cluster, kinds: ParameterKinds, size: float) -> float:
    """Return the seconds of a gather of `size` bytes in two hops, and of the passes over memory around them."""
    quantisation = parallel.messages.of_weights
    assert quantisation is not None
    # codes are read, and weights written
    touched = quantisation.bytes + BLOCKED + parallel.bytes
    passes = kinds.in_hops * touched / cluster.touch_bytes_per_s
    return passes + _sent_seconds(cluster, "gather", size, node_hops(parallel, cluster))


def _sent_seconds(cluster: Cluster, kind: Collective, size: float, hops: tuple[NodeHop, NodeHop]) -> float:
    """Return the seconds of two hops one after the other, in each of which both levels of links send at once."""
    seconds = 0.0
    for hop in hops:
        if hop.ranks > 1:
            far = cluster.link(0, hop.last)
            sent = max(size * hop.inside / cluster.inside.rate(kind), size * hop.between / far.rate(kind))
            seconds += sent + far.least_s * ceil(log2(hop.ranks))
    return seconds


def left_bytes(parallel: Parallel, cluster: Cluster, coded: float) -> float:
    """Return the bytes of what quantised gradients leave over for the next step; 0 where nothing is kept."""
    quantisation = parallel.messages.of_gradients
    if quantisation is None or not quantisation.keeps:
        return 0.0
    return LEFT * coded * sum(hop.share for hop in node_hops(parallel, cluster))
