"""Run a layer of experts on ranks without data for its trace, and on small ones with data for its proof."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from megatron_cp.comm import Fabric, SingleFabric, in_process
from megatron_cp.context.trace.events import Matmul, Pass, Post, Step, match
from megatron_cp.context.trace.record import Recorder, RecordingFabric
from megatron_cp.experts import LOOP
from megatron_cp.experts.dispatch_cost import STOCK, Dispatch, ExpertRanks
from megatron_cp.experts.exchange import HopPlan, TwoHopExchange
from megatron_cp.experts.routed_layer import LayerSize, RankTensors, RoutedLayer, tensors_of
from megatron_cp.experts.shared_layer import SharedLayer, cut_for

THERE, EXPERTS, HOME = "there", "experts", "home"
GATHER, SCATTER = "gather", "scatter"


class Leg(NamedTuple):
    """One step of a rank in a pass: it sends rows there or home, or computes its experts, of one piece.

    Ranks that share each expert also gather tokens or weights, and scatter what belongs to the others.

    inside, between: messages to ranks of its node and of others, and their bytes
    flops:           of products
    """

    what: str
    piece: int
    inside: tuple[int, int] = (0, 0)
    between: tuple[int, int] = (0, 0)
    flops: int = 0

    def plus(self, other: "Leg") -> "Leg":
        """Return both as one, of the same kind and piece."""
        inside, between = (
            (mine[0] + its[0], mine[1] + its[1])
            for mine, its in ((self.inside, other.inside), (self.between, other.between))
        )
        return Leg(self.what, self.piece, inside, between, self.flops + other.flops)


class ExpertTrace(NamedTuple):
    """Both passes of all ranks, and what each rank does in them in its order."""

    forward: Pass
    backward: Pass
    legs: tuple[tuple[tuple[Leg, ...], tuple[Leg, ...]], ...]


def record_experts(size: LayerSize, dispatch: Dispatch, ranks: ExpertRanks, per_node: int, dtype: str) -> ExpertTrace:
    """Return the trace of a layer of experts, without computing or sending anything.

    per_node: ranks of a node of the cluster, whatever two hops take for one
    Raises UnmatchedError for ranks that would hang.
    """
    made = [_record_rank(size, dispatch, ranks, per_node, getattr(torch, dtype), rank) for rank in range(ranks.all)]
    forward, backward = (Pass(tuple(each[0][at] for each in made), 0) for at in (0, 1))
    for run in (forward, backward):
        match(run)
    return ExpertTrace(forward, backward, tuple(legs for _, legs in made))


def prove_experts(size: LayerSize, dispatch: Dispatch, ranks: ExpertRanks, per_node: int | None = None) -> float:
    """Return the largest relative error in float64 of outputs and gradients against one rank that has all experts.

    Sizes are small ones with as many experts; ranks are threads of this process.
    """
    small = LayerSize(size.experts, 4 * size.experts, 8, 8 * ranks.tensor, size.skew)
    expected = [_alone(small, rank, ranks.sharing) for rank in range(ranks.all)]
    of_weights = [sum(gradients) for gradients in zip(*(each[3:] for each in expected), strict=True)]
    local, worst = size.experts // ranks.sharing, 0.0
    for rank, found in enumerate(in_process(ranks.all, partial(_of_rank, small, dispatch, ranks), per_node)):
        mine = slice(rank // ranks.tensor * local, (rank // ranks.tensor + 1) * local)
        halves = tuple(of_weights[: size.experts][mine]), tuple(of_weights[size.experts :][mine])
        cut = cut_for(RankTensors([], [], [], [], *halves), ranks.tensor, rank % ranks.tensor)
        for ours, its in zip(found, [*expected[rank][:3], *cut.weights], strict=True):
            worst = max(worst, float((ours - its.detach()).abs().max() / its.detach().abs().max()))
    return worst


def _of_rank(size: LayerSize, dispatch: Dispatch, ranks: ExpertRanks, fabric: Fabric) -> list[Tensor]:
    held = _tensors_of(size, dispatch, ranks, fabric.rank, torch.float64, torch.device("cpu"))
    if ranks.tensor == 1:
        return RoutedLayer(fabric, size, dispatch, held, LOOP).run()
    sharing, around = (fabric.subset(members) for members in _groups_of(ranks, fabric.rank))
    return SharedLayer(sharing, around, size, dispatch, held, LOOP).run()


def _tensors_of(
    size: LayerSize, dispatch: Dispatch, ranks: ExpertRanks, rank: int, dtype: torch.dtype, device: torch.device
) -> RankTensors:
    whole = tensors_of(size, dispatch, rank // ranks.tensor, ranks.sharing, dtype, device, rank)
    return cut_for(whole, ranks.tensor, rank % ranks.tensor) if ranks.tensor > 1 else whole


def _groups_of(ranks: ExpertRanks, rank: int) -> tuple[range, range]:
    """Return the ranks that share out the experts with a rank, and those that share each of them."""
    first = rank // ranks.tensor * ranks.tensor
    return range(rank % ranks.tensor, ranks.all, ranks.tensor), range(first, first + ranks.tensor)


def _alone(size: LayerSize, rank: int, sharing: int) -> list[Tensor]:
    """Return what the rows of a rank give with all experts on it."""
    device = torch.device("cpu")
    held = [tensors_of(size, STOCK, each, sharing, torch.float64, device) for each in range(sharing)]
    first = tuple(chain.from_iterable(each.first for each in held))
    second = tuple(chain.from_iterable(each.second for each in held))
    rows = tensors_of(size, STOCK, 0, sharing, torch.float64, device, rank)
    return RoutedLayer(SingleFabric(), size, STOCK, rows._replace(first=first, second=second), LOOP).run()


class _Mark(NamedTuple):
    """Where a leg begins among the steps of a pass; the end of one."""

    at: int
    what: str
    piece: int


class _Noted(TwoHopExchange):
    """An exchange that notes where each of its calls begins and ends."""

    def __init__(self, inside: Fabric, between: Fabric, notes: "_Notes") -> None:
        super().__init__(inside, between)
        self._notes = notes

    def there(self, rows: Tensor, plan: HopPlan) -> Tensor:
        self._notes.begin(THERE, self._piece(plan))
        found = super().there(rows, plan)
        self._notes.begin("", 0)
        return found

    def home(self, rows: Tensor, plan: HopPlan) -> Tensor:
        self._notes.begin(HOME, self._piece(plan))
        found = super().home(rows, plan)
        self._notes.begin("", 0)
        return found

    def _piece(self, plan: HopPlan) -> int:
        # pieces may have equal plans
        return next(at for at, each in enumerate(self._notes.plans) if each is plan)


class _NotedFabric(RecordingFabric):
    """A fabric that notes where each gather and scatter begins and ends."""

    notes: "_Notes"

    def subset(self, ranks: Sequence[int]) -> NoReturn:
        raise NotImplementedError("ranks that share each expert are not divided")

    def all_gather(self, local: Tensor) -> Tensor:
        self.notes.begin(GATHER, 0)
        found = super().all_gather(local)
        self.notes.begin("", 0)
        return found

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        self.notes.begin(SCATTER, 0)
        found = super().reduce_scatter(whole)
        self.notes.begin("", 0)
        return found


class _Notes:
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.marks: list[_Mark] = []
        self.plans: list[HopPlan] = []

    def begin(self, what: str, piece: int) -> None:
        self.marks.append(_Mark(self._recorder.noted, what, piece))

    def take(self) -> list[_Mark]:
        marks, self.marks = self.marks, []
        return marks


def _record_rank(
    size: LayerSize, dispatch: Dispatch, ranks: ExpertRanks, per_node: int, dtype: torch.dtype, rank: int
) -> tuple[tuple[tuple[Step, ...], tuple[Step, ...]], tuple[tuple[Leg, ...], tuple[Leg, ...]]]:
    held = _tensors_of(size, dispatch, ranks, rank, dtype, torch.device("meta"))
    recorder = Recorder(*held.rows, *held.probs, *held.gradients, *held.weights)
    notes, passes, legs = _Notes(recorder), [], []
    sharing, shared = _groups_of(ranks, rank)
    fabric = RecordingFabric(recorder, tuple(sharing), rank, per_node)
    around = _NotedFabric(recorder, tuple(shared), rank, per_node)
    around.notes = notes

    def exchange(inside: Fabric, between: Fabric) -> TwoHopExchange:
        return _Noted(inside, between, notes)

    if ranks.tensor == 1:
        layer = RoutedLayer(fabric, size, dispatch, held, LOOP, exchange)
    else:
        layer = SharedLayer(fabric, around, size, dispatch, held, LOOP, exchange)
    notes.plans = layer.plans
    with recorder:
        outputs = layer.forward()
        for run in (lambda: None, lambda: layer.backward(outputs)):
            run()
            steps = recorder.take()
            passes.append(steps)
            legs.append(tuple(_legs(steps, notes.take(), rank // per_node, per_node)))
    return (passes[0], passes[1]), (legs[0], legs[1])


def _legs(steps: tuple[Step, ...], marks: list[_Mark], node: int, per_node: int) -> Iterator[Leg]:
    """Yield what lies between marks, those of one kind and piece as one; products belong to what goes home next."""
    found: Leg | None = None
    ends = [*(mark.at for mark in marks[1:]), len(steps)]
    for number, (mark, end) in enumerate(zip(marks, ends, strict=True)):
        leg = _leg(steps[mark.at : end], mark, node, per_node)
        if leg.what == EXPERTS and not leg.flops:
            continue
        if leg.what not in (THERE, HOME):
            leg = leg._replace(piece=next((each.piece for each in marks[number:] if each.what == HOME), 0))
        if found is not None and (found.what, found.piece) == (leg.what, leg.piece):
            found = found.plus(leg)
            continue
        if found is not None:
            yield found
        found = leg
    if found is not None:
        yield found


def _leg(steps: tuple[Step, ...], mark: _Mark, node: int, per_node: int) -> Leg:
    sizes = [
        (message.peer, message.size) for step in steps if isinstance(step.event, Post) for message in step.event.sends
    ]
    near, far = ([size for peer, size in sizes if (peer // per_node == node) == inside] for inside in (True, False))
    flops = sum(step.event.flops for step in steps if isinstance(step.event, Matmul))
    return Leg(mark.what or EXPERTS, mark.piece, (len(near), sum(near)), (len(far), sum(far)), flops)
