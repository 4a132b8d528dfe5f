"""A layer of gated experts on the ranks of a fabric, whose rows are routed by Zipf's law: what bench and trace run.

Exchange, pieces and products are those of training; router, permutation and Megatron's modules are left out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_cp.comm import Fabric
from megatron_cp.experts import PRODUCTS
from megatron_cp.experts.dispatch_cost import Dispatch
from megatron_cp.experts.exchange import HopPlan, TwoHopExchange, hops, sent_home, sent_there, transposed
from megatron_cp.experts.function import GroupedCall, grouped_linear
from megatron_cp.experts.groups import GroupStep, by_step, group_plans, group_steps
from megatron_cp.experts.load import zipf
from megatron_cp.experts.pieces import PieceLoop, in_pieces
from megatron_cp.experts.product import Groups, groups_of

Exchange = Callable[[Fabric, Fabric], TwoHopExchange]


class LayerSize(NamedTuple):
    """Sizes of a layer of gated experts.

    experts: of all ranks, a multiple of their number
    rows:    that a rank sends, each token as often as it is routed
    skew:    exponent of Zipf's law for the loads, which are equal on all ranks; the busiest experts are the first
    """

    experts: int
    rows: int
    hidden: int
    ffn: int
    skew: float = 0.0

    def pieces(self, number: int) -> list[list[int]]:
        """Return the rows of each expert in each of so many pieces."""
        loads = zipf(self.experts, self.rows, self.skew)
        return [[load * (at + 1) // number - load * at // number for load in loads] for at in range(number)]


class RankTensors(NamedTuple):
    """Rows and experts of a rank; the first four of each piece, or of each group of ranks.

    places: of its rows among the rank's rows in order of expert
    rows, probs, gradients: [T h], [T] and of the output [T h], in order of expert
    first, second: the two linears of each of its experts
    """

    places: list[Tensor]
    rows: list[Tensor]
    probs: list[Tensor]
    gradients: list[Tensor]
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.first + self.second


def tensors_of(
    size: LayerSize,
    dispatch: Dispatch,
    rank: int,
    ranks: int,
    dtype: torch.dtype,
    device: torch.device,
    drawn_as: int | None = None,
) -> RankTensors:
    """Return what one of the ranks has, drawn by rank and by expert; without data on the device "meta".

    drawn_as: number that its rows are drawn by; None for its rank
    """
    number = rank if drawn_as is None else drawn_as

    def draw(seed: int, *shape: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (drawn / shape[-1] ** 0.5).to(device, dtype)

    local, places = size.experts // ranks, _places(size, dispatch, rank, ranks)
    mine, shape = range(rank * local, (rank + 1) * local), (size.rows, size.hidden)
    wholes = (draw(3 * number + at, *each) for at, each in enumerate((shape, shape[:1], shape)))
    rows, probs, gradients = ([whole[at.to(device)] for at in places] for whole in wholes)
    for each in (*rows, *probs):
        each.requires_grad_()
    first = tuple(draw(1000 + expert, 2 * size.ffn, size.hidden).requires_grad_() for expert in mine)
    second = tuple(draw(100_000 + expert, size.hidden, size.ffn).requires_grad_() for expert in mine)
    return RankTensors(places, rows, probs, gradients, first, second)


class RoutedLayer:
    """One rank of the layer.

    exchange: makes the exchange from the ranks of this node and those at this rank's place in all nodes
    """

    def __init__(
        self,
        fabric: Fabric,
        size: LayerSize,
        dispatch: Dispatch,
        tensors: RankTensors,
        product: str,
        exchange: Exchange = TwoHopExchange,
    ) -> None:
        ranks, local = fabric.size, size.experts // fabric.size
        per_node = (dispatch.per_node or ranks) if dispatch.two_hops else 1
        self.exchange, self._ahead = exchange(*hops(fabric, per_node)), dispatch.ahead
        self._tensors, self._product = tensors, PRODUCTS.get(product).load()()
        self._first, self._second = tensors.first, tensors.second
        self.plans: list[HopPlan] = []
        self._computes: list[Callable[[Tensor, Tensor], Tensor]] = []
        for counts in size.pieces(dispatch.pieces):
            for_ranks = _for_ranks(counts, ranks)
            mine = counts[fabric.rank * local : (fabric.rank + 1) * local]
            sources = [ranks]
            if dispatch.by_groups:
                steps = _steps(dispatch, fabric.rank, ranks)
                self.plans += group_plans(self.exchange, for_ranks, [sum(mine)] * ranks, steps)
                sources = [len(step.source) for step in steps]
            else:
                self.plans.append(self.exchange.plan([for_ranks] * self.exchange.inside.size, [sum(mine)] * ranks))
            for senders in sources:
                self._computes.append(self._compute(mine, senders, tensors.rows[0].device))

    def forward(self) -> tuple[Tensor, ...]:
        """Return what has come home of each piece, with autograd."""
        return self._through(self._tensors.rows, self._tensors.weights)

    def _through(self, rows: Sequence[Tensor], weights: Sequence[Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        """Return what has come home of rows; leaves as in PieceLoop."""
        probs = self._tensors.probs
        if len(self.plans) > 1:
            loop = PieceLoop(self.exchange, self.plans, self._computes, True, leaves, ahead=self._ahead)
            return in_pieces(loop, rows, probs, weights)
        (plan,), (compute,) = self.plans, self._computes
        arrived = (sent_there(self.exchange, plan, each) for each in (rows[0], probs[0]))
        return (sent_home(self.exchange, plan, compute(*arrived)),)

    def backward(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of all pieces' rows, of all their probabilities, and of the weights."""
        given = (*self._tensors.rows, *self._tensors.probs, *self._tensors.weights)
        return list(torch.autograd.grad(outputs, given, self._tensors.gradients))

    def run(self) -> list[Tensor]:
        """Return outputs, gradients of rows and of probabilities in order of expert, and gradients of weights."""
        outputs, number = self.forward(), len(self.plans)
        found = self.backward(outputs)
        parts = ([each.detach() for each in outputs], found[:number], found[number : 2 * number])
        return [*map(self._whole, parts), *found[2 * number :]]

    def _whole(self, parts: Sequence[Tensor]) -> Tensor:
        whole = torch.empty_like(torch.cat(list(parts)))
        for places, part in zip(self._tensors.places, parts, strict=True):
            whole[places] = part
        return whole

    def _compute(self, mine: Sequence[int], senders: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what computes this rank's experts, for each of which every rank that sends has so many rows."""
        groups = groups_of([senders * count for count in mine], device)
        return partial(self._experts, tuple(mine) * senders, groups)

    def _experts(self, sizes: Sequence[int], groups: Groups, rows: Tensor, probs: Tensor) -> Tensor:
        local = len(groups.sizes)
        senders = len(sizes) // local
        x, of_rows = (transposed(each, sizes, senders, local) for each in (rows, probs))
        inner = grouped_linear(GroupedCall(self._product, groups, self._first), x)
        gate, value = inner.chunk(2, -1)
        call = GroupedCall(self._product, groups, self._second)
        y = grouped_linear(call, functional.silu(gate) * value * of_rows[:, None])
        # from each rank's rows of an expert to each expert's rows of a rank
        by_expert = [size for expert in range(local) for size in sizes[expert::local]]
        return transposed(y, by_expert, local, senders)


def _for_ranks(counts: Sequence[int], ranks: int) -> list[int]:
    local = len(counts) // ranks
    return [sum(counts[at : at + local]) for at in range(0, len(counts), local)]


def _steps(dispatch: Dispatch, rank: int, ranks: int) -> list[GroupStep]:
    return group_steps(rank, ranks, dispatch.group or 1)


def _places(size: LayerSize, dispatch: Dispatch, rank: int, ranks: int) -> list[Tensor]:
    """Return the places of the rows of each piece, or for each group, among all rows in order of expert."""
    cuts = size.pieces(dispatch.pieces)
    if dispatch.by_groups:
        return list(by_step(torch.arange(size.rows), _for_ranks(cuts[0], ranks), _steps(dispatch, rank, ranks)))
    firsts = list(accumulate((sum(counts) for counts in zip(*cuts, strict=True)), initial=0))
    found = []
    for counts in cuts:
        ends = [first + count for first, count in zip(firsts, counts, strict=False)]
        found.append(list(chain.from_iterable(map(range, firsts, ends))))
        firsts = ends
    return [torch.tensor(places, dtype=torch.int64) for places in found]
