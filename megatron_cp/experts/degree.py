"""Exchange `tutel`: its number of pieces and its hops by the costs of a cluster (Tutel, arXiv:2206.03382, section 3.3).

Tutel measures each degree once for a number of tokens and remembers the best; here the costs say it before the run.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.experts import PIPELINED, TWO_HOP
from megatron_cp.experts.dispatch_cost import STOCK, Dispatch, DispatchSize, ExpertRanks, PassSeconds, dispatch_seconds
from megatron_cp.hardware.cluster import Cluster

DEGREES = (1, 2, 4, 8)
"""Numbers of pieces that are weighed."""

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
    """

    tokens: float
    choices: int
    experts: int
    hidden: int
    ffn: int
    matrices: int
    dtype: str
    split: bool


def weigh(
    size: MixtureSize, ranks: ExpertRanks, cluster: Cluster, degrees: Sequence[int], per_node: int | None
) -> list[WeighedDispatch]:
    """Return one exchange and two hops with each number of pieces, fastest first; of equal ones the simpler.

    per_node: ranks that two hops take for a node; None for the cluster's
    Raises ValueError where the cluster has no rates for the dtype.
    """
    found = []
    for way in _ways(degrees, per_node):
        one = _product_seconds(size, ranks, cluster, way.pieces)
        rows = size.tokens * size.choices
        sent = DispatchSize(size.tokens, rows, size.hidden * BYTES[size.dtype], size.experts)
        experts = PassSeconds(one, one if size.split else 2 * one)
        try:
            travelling = dispatch_seconds(way, sent, ranks, cluster, experts).total
        except Refused:
            # nodes with different numbers of the ranks that share experts
            continue
        found.append(WeighedDispatch(way, 3 * one + travelling))
    return sorted(found, key=lambda each: each.seconds)


def _ways(degrees: Sequence[int], per_node: int | None) -> Iterator[Dispatch]:
    for pieces in degrees:
        yield STOCK if pieces == 1 else STOCK._replace(comm_type=PIPELINED, pieces=pieces)
        yield STOCK._replace(comm_type=TWO_HOP, pieces=pieces, per_node=per_node)


def _product_seconds(size: MixtureSize, ranks: ExpertRanks, cluster: Cluster, pieces: int) -> float:
    """Return the seconds of a rank's experts in forward, of all pieces, with equal loads."""
    rows, width = size.tokens * size.choices * ranks.tensor, size.ffn / ranks.tensor
    calls = 2 * size.experts / ranks.sharing * pieces
    rate = cluster.gemm(size.dtype).rate(min(2 * rows / calls, size.hidden, width))
    return calls * cluster.call_s + 2 * rows * size.matrices * size.hidden * width / rate
