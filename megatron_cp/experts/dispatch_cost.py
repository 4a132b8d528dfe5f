"""Seconds and bytes of tokens on their way to experts and back: Megatron's dispatchers, two hops, pieces.

Assumed: an all-to-all is a pairwise exchange, p - 1 latencies beside its bytes (Thakur, Rabenseifner and Gropp, 2005,
Optimization of collective communication operations in MPICH), inside nodes and between them at once. Two hops follow
one another, and rows are copied for each. On a GPU the messages of pieces, and those to groups of ranks, go one after
the other beside the experts, in the order of `megatron_cp.experts.pieces.in_turn`; on a CPU nothing is beside anything.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from megatron_cp.experts import EXCHANGES, MEGATRONS, TOKENS, TWO_HOP, WEIGHTS
from megatron_cp.experts.groups import check_group, group_size, group_steps
from megatron_cp.experts.nodes import ranks_of_a_node
from megatron_cp.hardware.cluster import Cluster, Collective
from megatron_cp.hardware.operations import collective_seconds

ALLTOALL, ALLGATHER = "alltoall", "allgather"
"""Megatron's dispatchers, by the names of --moe-token-dispatcher-type."""
DISPATCHERS = (ALLGATHER, ALLTOALL, "flex")

PROBABILITY, COUNT, CHOSEN = 4, 8, 1
"""Bytes of a row's probability, of a count of rows, and of whether a token asks for an expert."""


class Dispatch(NamedTuple):
    """How tokens travel to experts and back.

    dispatcher: Megatron's, one of DISPATCHERS; "flex" has the cost of "alltoall"
    comm_type:  the exchange, a name in EXCHANGES
    pieces:     into which tokens are cut, as --moe-pieces
    per_node:   ranks that two hops take for a node, as --moe-ranks-per-node; None for the cluster's
    group:      ranks that rows go to in one step, as --moe-group-ranks; None for those of a node of the cluster
    gather:     what ranks that share each expert gather, TOKENS or WEIGHTS
    """

    dispatcher: str = ALLTOALL
    comm_type: str = MEGATRONS
    pieces: int = 1
    per_node: int | None = None
    group: int | None = None
    gather: str = TOKENS

    @property
    def by_groups(self) -> bool:
        """True if rows go to one group of ranks after the other; ValueError for a name unknown."""
        return EXCHANGES.get(self.comm_type).groups and self.pieces == 1

    @property
    def two_hops(self) -> bool:
        """True if tokens travel inside nodes and then between them; ValueError for a name unknown."""
        return EXCHANGES.get(self.comm_type).name == TWO_HOP

    @property
    def ahead(self) -> int | None:
        """Pieces that leave before one is computed, beside it; None for all."""
        return EXCHANGES.get(self.comm_type).ahead

    def __str__(self) -> str:
        exchange = EXCHANGES.get(self.comm_type).name
        name = self.dispatcher if exchange == MEGATRONS else exchange
        if self.by_groups:
            size = "" if self.group is None else f"{self.group} "
            name = f"{name} in groups of {size}rank{'s' * (self.group != 1)}"
        elif self.pieces > 1:
            name = f"{name} in {self.pieces} pieces"
        return f"{name} with weights gathered" if self.gather == WEIGHTS else name


STOCK = Dispatch()
"""Megatron's alltoall dispatcher as it is."""


class ExpertRanks(NamedTuple):
    """Ranks of a layer's experts.

    sharing: that share them, of expert parallelism
    tensor:  neighbours that share each of them, of expert tensor parallelism
    """

    sharing: int
    tensor: int = 1

    @property
    def all(self) -> int:
        """Number of ranks that hold one copy of all experts."""
        return self.sharing * self.tensor

    def __str__(self) -> str:
        return f"{self.sharing} x {self.tensor}" if self.tensor > 1 else f"{self.sharing}"


class DispatchSize(NamedTuple):
    """Size of a layer and microbatch on a rank.

    tokens:    its own
    rows:      that it sends, or gets where that is more, each token as often as it is routed
    row_bytes: of a hidden state
    experts:   of the layer
    weights:   bytes of a whole expert; read where weights are gathered
    times:     microbatches of a step, which share one gather of weights
    """

    tokens: float
    rows: float
    row_bytes: float
    experts: int
    weights: float = 0.0
    times: float = 1.0


class PassSeconds(NamedTuple):
    """Seconds of a forward and of a backward."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


class SentBytes(NamedTuple):
    """Bytes that a rank sends inside its node and to other nodes."""

    inside: float
    between: float

    def plus(self, other: "SentBytes", times: float = 1.0) -> "SentBytes":
        return SentBytes(self.inside + times * other.inside, self.between + times * other.between)


def per_node_of(dispatch: Dispatch, ranks: ExpertRanks, cluster: Cluster) -> int:
    """Return how many of the ranks that share experts lie on a node; ValueError where two hops find unequal nodes."""
    node = cluster.ranks_per_node
    if dispatch.two_hops:
        node = dispatch.per_node or node
        return ranks_of_a_node([rank * ranks.tensor // node for rank in range(ranks.sharing)])
    return min(ranks.sharing, max(1, node // ranks.tensor))


def group_of(dispatch: Dispatch, ranks: ExpertRanks, cluster: Cluster) -> int:
    """Return how many ranks rows go to in a step; ValueError where they do not divide those that share experts."""
    if dispatch.group is None:
        return group_size(ranks.sharing, max(1, cluster.ranks_per_node // ranks.tensor))
    check_group(dispatch.group, ranks.sharing)
    return dispatch.group


def calls_of(dispatch: Dispatch, ranks: ExpertRanks, cluster: Cluster) -> int:
    """Return how often experts are called for a microbatch; ValueError as `group_of`."""
    return ranks.sharing // group_of(dispatch, ranks, cluster) if dispatch.by_groups else dispatch.pieces


def exchange_bytes(size: float, ranks: int, per_node: int, *, two_hops: bool) -> SentBytes:
    """Return what a rank sends of `size` bytes with an even load, a share of which is its own.

    Of one hop a share goes to each rank. Of two hops, a rank's neighbours get in the first one what they pass on in the
    second, which sends between nodes as much as one hop does.
    """
    near = (per_node - 1) / (per_node if two_hops else ranks)
    return SentBytes(size * near, size * (ranks - per_node) / ranks)


def exchange_seconds(size: float, ranks: ExpertRanks, dispatch: Dispatch, cluster: Cluster) -> float:
    """Return the seconds of one exchange of `size` bytes of a rank, its own share included."""
    p, n = ranks.sharing, per_node_of(dispatch, ranks, cluster)
    sent = exchange_bytes(size, p, n, two_hops=dispatch.two_hops)
    inside, between = (cluster.link(0, (last - 1) * ranks.tensor) for last in (n, p))
    if not dispatch.two_hops:
        return _pairwise_seconds(n - 1, p - n, size / p, ranks, n, cluster)
    near, far = sent.inside / inside.rate("gather"), sent.between / between.rate("gather")
    # rows are read and written before each hop; neither is sorted where one of the two has nothing to send
    copied = 4 * size / cluster.touch_bytes_per_s if 1 < n < p else 0.0
    return (n - 1) * inside.least_s + near + (p // n - 1) * between.least_s + far + copied


def _pairwise_seconds(near: int, far: int, each: float, ranks: ExpertRanks, node: int, cluster: Cluster) -> float:
    """Return the seconds of messages of `each` bytes to so many ranks of this node and of others, on both at once."""
    inside, between = (cluster.link(0, (last - 1) * ranks.tensor) for last in (node, ranks.sharing))
    return max(
        near * (inside.least_s + each / inside.rate("gather")), far * (between.least_s + each / between.rate("gather"))
    )


def _each_exchange(size: float, ranks: ExpertRanks, dispatch: Dispatch, cluster: Cluster) -> list[float]:
    """Return the seconds of the exchange of each piece, or with each group, of `size` bytes of a rank in all."""
    if not dispatch.by_groups:
        return [exchange_seconds(size / dispatch.pieces, ranks, dispatch, cluster)] * dispatch.pieces
    p, node = ranks.sharing, per_node_of(dispatch, ranks, cluster)
    found = []
    for step in group_steps(0, p, group_of(dispatch, ranks, cluster)):
        near = sum(rank < node for rank in step.to)
        # a rank sends itself nothing
        itself = int(0 in step.to)
        found.append(_pairwise_seconds(near - itself, len(step.to) - near, size / p, ranks, node, cluster))
    return found


def loop_seconds(
    there: Sequence[float], compute: float, back: Sequence[float], *, beside: bool, ahead: int | None = 1
) -> float:
    """Return the seconds from the first piece's leaving until the last is back.

    there, back: of the messages of each piece, which go one after the other
    compute: of each piece's experts
    ahead:   pieces that leave before one is computed, beside it; None for all
    beside:  messages travel while experts compute
    """
    pieces = len(there)
    if not beside:
        return sum(there) + pieces * compute + sum(back)
    sent = computed = 0.0
    arrived: list[float] = []
    for piece in range(pieces):
        # so many leave before this one is computed, which goes back before the one after them leaves
        while len(arrived) < (pieces if ahead is None else min(pieces, piece + 1 + ahead)):
            sent += there[len(arrived)]
            arrived.append(sent)
        computed = max(computed, arrived[piece]) + compute
        sent = max(sent, computed) + back[piece]
    return sent


def dispatch_seconds(
    dispatch: Dispatch, size: DispatchSize, ranks: ExpertRanks, cluster: Cluster, experts: PassSeconds
) -> PassSeconds:
    """Return the seconds of a layer and microbatch in which tokens travel and no expert computes.

    Rows travel there and back in each pass, probabilities there in forward and their gradients back in backward, each
    in a message of its own. Expert tensor parallelism gathers the rows of its ranks and adds up what they make of them,
    or gathers weights once in a step and adds up their gradients in each backward.

    experts: of a rank's experts in a pass, all pieces together
    Raises ValueError where two hops find unequal nodes, and where groups do not divide the ranks.
    """
    if dispatch.dispatcher == ALLGATHER:
        return _gathered(size, ranks, cluster)
    rows, probabilities = size.rows * size.row_bytes, size.rows * PROBABILITY
    states, chances = (_each_exchange(each, ranks, dispatch, cluster) for each in (rows, probabilities))
    pieces, both = len(states), list(map(sum, zip(states, chances, strict=True)))
    sharing = 1 if dispatch.gather == WEIGHTS else ranks.tensor
    (gather, scatter), (gather_chances, scatter_chances) = (
        [collective_seconds(cluster, kind, each / pieces * sharing, sharing, 1) for kind in ("gather", "scatter")]
        for each in (rows, probabilities)
    )
    played = partial(loop_seconds, beside=cluster.device == "cuda", ahead=dispatch.ahead)
    forward = played(both, experts.forward / pieces + gather + gather_chances + scatter, states)
    backward = played(states, experts.backward / pieces + gather + scatter + scatter_chances, both)
    # groups are of one count, pieces have their own
    counted = dispatch.pieces * _counts(dispatch, size, ranks, cluster)
    weights = _weights(dispatch, size, ranks, cluster)
    return PassSeconds(
        counted + weights.forward + forward - experts.forward, weights.backward + backward - experts.backward
    )


def dispatch_bytes(dispatch: Dispatch, size: DispatchSize, ranks: ExpertRanks, cluster: Cluster) -> SentBytes:
    """Return what a rank sends for a layer and microbatch, forward and backward, counts of rows left out."""
    p = ranks.all
    if dispatch.dispatcher == ALLGATHER:
        # states there and back in each pass, probabilities and their gradients, and who asks for whom
        each = 4 * size.row_bytes + size.experts * (2 * PROBABILITY + CHOSEN)
        return _around((p - 1) * size.tokens * each, p, cluster)
    once = size.rows * (4 * size.row_bytes + 2 * PROBABILITY)
    sent = exchange_bytes(once, ranks.sharing, per_node_of(dispatch, ranks, cluster), two_hops=dispatch.two_hops)
    if dispatch.gather == WEIGHTS:
        once = size.experts / ranks.sharing * size.weights / ranks.tensor * (1 + 1 / size.times)
    return sent.plus(_around((ranks.tensor - 1) * once, ranks.tensor, cluster))


def _weights(dispatch: Dispatch, size: DispatchSize, ranks: ExpertRanks, cluster: Cluster) -> PassSeconds:
    """Return the seconds of gathering a rank's experts, a microbatch's share, and of adding up their gradients."""
    if dispatch.gather != WEIGHTS:
        return PassSeconds(0.0, 0.0)
    whole = size.experts / ranks.sharing * size.weights
    gather, scatter = (collective_seconds(cluster, kind, whole, ranks.tensor, 1) for kind in ("gather", "scatter"))
    return PassSeconds(gather / size.times, scatter)


def _gathered(size: DispatchSize, ranks: ExpertRanks, cluster: Cluster) -> PassSeconds:
    """Return the seconds of gathering all tokens of all ranks and of adding up what their experts make of them."""

    def seconds(kind: Collective, each: float) -> float:
        return collective_seconds(cluster, kind, ranks.all * size.tokens * each, ranks.all, 1)

    gather, scatter = seconds("gather", size.row_bytes), seconds("scatter", size.row_bytes)
    probabilities, chosen = size.experts * PROBABILITY, size.experts * CHOSEN
    return PassSeconds(
        gather + scatter + seconds("gather", probabilities) + seconds("gather", chosen),
        gather + scatter + seconds("scatter", probabilities),
    )


def _counts(dispatch: Dispatch, size: DispatchSize, ranks: ExpertRanks, cluster: Cluster) -> float:
    """Return the seconds of gathering how many rows each rank has for each expert, with two hops for each rank too."""
    seconds = collective_seconds(cluster, "gather", ranks.all * size.experts * COUNT, ranks.all, 1)
    if not dispatch.two_hops:
        return seconds
    n = per_node_of(dispatch, ranks, cluster)
    return seconds + collective_seconds(cluster, "gather", n * ranks.sharing * COUNT, n, ranks.tensor)


def _around(size: float, ranks: int, cluster: Cluster) -> SentBytes:
    """Return `size` bytes of a ring of neighbours by level: of its hops one for each node leaves it."""
    away = 0.0 if ranks <= cluster.ranks_per_node else 1 / cluster.ranks_per_node
    return SentBytes(size * (1 - away), size * away)
