"""Exchange `tutel`: its number of pieces, its hops and what is gathered, by the costs of a cluster.

Tutel (arXiv:2206.03382, sections 3.2 and 3.3) measures each choice once for a number of tokens and remembers the best;
`megatron_cp.experts.memo` remembers what costs, or measured steps, say.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.experts import PIPELINED, TOKENS, TWO_HOP, WEIGHTS
from megatron_cp.experts.dispatch_cost import STOCK, Dispatch, DispatchSize, ExpertRanks, PassSeconds, dispatch_seconds
from megatron_cp.hardware.cluster import Cluster

DEGREES = (1, 2, 4, 8)
"""Numbers of pieces that are weighed."""

MOST_PIECES = 64
"""Pieces of a microbatch at most: each has messages of its own."""

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class WeighedDispatch(NamedTuple):
    """A way of tokens, and the seconds of a mixture layer's experts with it for a microbatch, in both passes."""

    dispatch: Dispatch
    seconds: float

    def __str__(self) -> str:
        return f"{self.dispatch} {self.seconds * 1e3:.3g} ms"


class MixtureSize(NamedTuple):
    """Sizes of a layer of experts.

    tokens:   of a rank in a microbatch
    choices:  experts of a token
    matrices: h by f, of an expert
    split:    weight gradients wait in a queue, away from the messages
    times:    microbatches of a step
    """

    tokens: float
    choices: int
    experts: int
    hidden: int
    ffn: int
    matrices: int
    dtype: str
    split: bool
    times: float = 1.0


def weigh(
    size: MixtureSize,
    ranks: ExpertRanks,
    cluster: Cluster,
    degrees: Sequence[int],
    per_node: int | None,
    gathers: Sequence[str] = (TOKENS,),
) -> list[WeighedDispatch]:
    """Return one exchange and two hops with each number of pieces, fastest first; of equal ones the simpler.

    per_node: ranks that two hops take for a node; None for the cluster's
    gathers:  what ranks that share each expert may gather
    Raises ValueError where the cluster has no rates for the dtype.
    """
    return weighed(
        [way._replace(gather=gather) for gather in gathers for way in ways(degrees, per_node)], size, ranks, cluster
    )


def weighed(
    candidates: Iterable[Dispatch], size: MixtureSize, ranks: ExpertRanks, cluster: Cluster
) -> list[WeighedDispatch]:
    """Return the candidates, fastest first; of equal ones the first. Those that the cluster cannot have are left out.

    Raises ValueError where the cluster has no rates for the dtype.
    """
    found = []
    for way in candidates:
        one = _product_seconds(size, ranks, cluster, way)
        rows, stored = size.tokens * size.choices, BYTES[size.dtype]
        weights = size.matrices * size.hidden * size.ffn * stored
        sent = DispatchSize(size.tokens, rows, size.hidden * stored, size.experts, weights, size.times)
        experts = PassSeconds(one, one if size.split else 2 * one)
        try:
            travelling = dispatch_seconds(way, sent, ranks, cluster, experts).total
        except Refused:
            # nodes with different numbers of the ranks that share experts
            continue
        found.append(WeighedDispatch(way, 3 * one + travelling))
    return sorted(found, key=lambda each: each.seconds)


def weighed_at_all(
    candidates: Sequence[Dispatch], size: MixtureSize, ranks: ExpertRanks, cluster: Cluster
) -> list[WeighedDispatch]:
    """Return `weighed`, or all candidates in their order, without seconds, where the cluster says nothing of them."""
    try:
        found = weighed(candidates, size, ranks, cluster)
    except Refused:
        # no rates for the dtype
        found = []
    return found or [WeighedDispatch(way, 0.0) for way in candidates]


def check_pieces(number: int, flag: str = "--moe-pieces") -> int:
    """Return a number of pieces; ValueError for one that no microbatch is cut into."""
    if not 1 <= number <= MOST_PIECES:
        raise Refused(
            f"{flag} must be from 1 to {MOST_PIECES}, got {number}; take as few as hide the messages, such as 4"
        )
    return number


def ways(degrees: Sequence[int], per_node: int | None) -> Iterator[Dispatch]:
    """Yield one exchange and two hops with each number of pieces."""
    for pieces in degrees:
        yield STOCK if pieces == 1 else STOCK._replace(comm_type=PIPELINED, pieces=pieces)
        yield STOCK._replace(comm_type=TWO_HOP, pieces=pieces, per_node=per_node)


def _product_seconds(size: MixtureSize, ranks: ExpertRanks, cluster: Cluster, way: Dispatch) -> float:
    """Return the seconds of a rank's experts in forward, of all pieces, with equal loads."""
    sharing = 1 if way.gather == WEIGHTS else ranks.tensor
    rows, width = size.tokens * size.choices * sharing, size.ffn / sharing
    calls = 2 * size.experts / ranks.sharing * way.pieces
    rate = cluster.gemm(size.dtype).rate(min(2 * rows / calls, size.hidden, width))
    return calls * cluster.call_s + 2 * rows * size.matrices * size.hidden * width / rate
