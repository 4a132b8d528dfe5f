"""Exchange `two-hop`: rows travel inside their node first and then between nodes, so that nodes send few messages.

The two-dimensional hierarchical all-to-all of Tutel (arXiv:2206.03382) and the hierarchical one of DeepSpeed-MoE
(arXiv:2201.05596), with any number of rows for each rank. A rank hands rows for the n-th rank of any node to the n-th
rank of its own node, which sends to each node at once what all ranks of its node have for that one. Ranks are numbered
node by node.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Fabric, SingleFabric


class Hop(NamedTuple):
    """Rows that a rank sends to, and gets from, each rank of one hop."""

    sends: tuple[int, ...]
    recvs: tuple[int, ...]


class HopPlan(NamedTuple):
    """Rows of one exchange, on the host.

    own:     of this rank, for each rank of the group
    passing: of each rank of the node, for this rank's like in each node: what it passes on, in the order of arrival
    inside, between: the hops
    """

    own: tuple[int, ...]
    passing: tuple[int, ...]
    inside: Hop
    between: Hop


def hops(whole: Fabric, per_node: int) -> tuple[Fabric, Fabric]:
    """Return the ranks of this rank's node and those at its place in all nodes; all processes make them together."""
    first = whole.rank // per_node * per_node
    inside, between = range(first, first + per_node), range(whole.rank % per_node, whole.size, per_node)
    return _among(whole, inside), _among(whole, between)


def _among(whole: Fabric, ranks: Sequence[int]) -> Fabric:
    if len(ranks) == 1:
        return SingleFabric()
    return whole if len(ranks) == whole.size else whole.subset(ranks)


class TwoHopExchange:
    """The ranks of a group of whole nodes.

    inside:  this rank's node
    between: its like, the ranks at its place in all nodes
    calls:   exchanges made, forward and backward
    """

    name = "two-hop"

    def __init__(self, inside: Fabric, between: Fabric) -> None:
        self.inside, self.between, self.calls = inside, between, 0

    def plan(self, leaving: Sequence[Sequence[int]], arriving: Sequence[int]) -> HopPlan:
        """Return the plan of an exchange; communicates nothing.

        leaving:  for each rank of this node, its rows for each rank of the group
        arriving: rows for this rank from each rank of the group
        """
        per_node, place = self.inside.size, self.inside.rank
        own = leaving[place]
        passing = [row[place::per_node] for row in leaving]
        return HopPlan(
            own=tuple(own),
            passing=tuple(chain.from_iterable(passing)),
            inside=Hop(tuple(sum(own[at::per_node]) for at in range(per_node)), tuple(map(sum, passing))),
            between=Hop(
                tuple(map(sum, zip(*passing, strict=True))),
                tuple(sum(arriving[first : first + per_node]) for first in range(0, len(arriving), per_node)),
            ),
        )

    def there(self, rows: Tensor, plan: HopPlan) -> Tensor:
        """Return the rows for this rank, in order of rank, from rows [T ...] in order of the rank that they are for."""
        self.calls += 1
        nodes, per_node = self.between.size, self.inside.size
        rows = self.inside.all_to_all(transposed(rows, plan.own, nodes, per_node), *plan.inside)
        return self.between.all_to_all(transposed(rows, plan.passing, per_node, nodes), *plan.between)

    def home(self, rows: Tensor, plan: HopPlan) -> Tensor:
        """Return to every rank, in its order, what became of the rows that it has sent there: the same way back."""
        self.calls += 1
        nodes, per_node = self.between.size, self.inside.size
        passing = [size for at in range(nodes) for size in plan.passing[at::nodes]]
        own = [size for at in range(per_node) for size in plan.own[at::per_node]]
        rows = self.between.all_to_all(rows, plan.between.recvs, plan.between.sends)
        rows = self.inside.all_to_all(transposed(rows, passing, nodes, per_node), plan.inside.recvs, plan.inside.sends)
        return transposed(rows, own, per_node, nodes)


def transposed(rows: Tensor, sizes: Sequence[int], high: int, wide: int) -> Tensor:
    """Return chunks of rows, which lie in a table of `high` by `wide`, column by column."""
    if high == 1 or wide == 1:
        return rows
    chunks = rows.split(list(sizes))
    return torch.cat([chunk for column in range(wide) for chunk in chunks[column::wide]])


class _Exchanged(torch.autograd.Function):
    """Rows there, whose gradients come home, or the other way round."""

    @staticmethod
    def forward(ctx: Any, exchange: TwoHopExchange, plan: HopPlan, home: bool, rows: Tensor) -> Tensor:
        ctx.exchange, ctx.plan, ctx.home = exchange, plan, home
        return exchange.home(rows, plan) if home else exchange.there(rows, plan)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, Tensor]:
        exchange, plan = ctx.exchange, ctx.plan
        return None, None, None, exchange.there(gradient, plan) if ctx.home else exchange.home(gradient, plan)


def sent_there(exchange: TwoHopExchange, plan: HopPlan, rows: Tensor) -> Tensor:
    """Return `there` of rows with autograd; keeps no tensor for backward, which is `home` of the gradient."""
    result: Tensor = _Exchanged.apply(exchange, plan, False, rows)
    return result


def sent_home(exchange: TwoHopExchange, plan: HopPlan, rows: Tensor) -> Tensor:
    """Return `home` of rows with autograd; keeps no tensor for backward, which is `there` of the gradient."""
    result: Tensor = _Exchanged.apply(exchange, plan, True, rows)
    return result
