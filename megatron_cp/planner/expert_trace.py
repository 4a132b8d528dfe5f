"""Run a layer of experts on ranks without data for its trace, and on small ones with data for its proof."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cp.comm import Fabric, SingleFabric, in_process
from megatron_cp.context.trace.events import Matmul, Pass, Post, Step, match
from megatron_cp.context.trace.record import Recorder, RecordingFabric
from megatron_cp.experts import LOOP
from megatron_cp.experts.dispatch_cost import STOCK, Dispatch
from megatron_cp.experts.exchange import HopPlan, TwoHopExchange
from megatron_cp.experts.routed_layer import LayerSize, RoutedLayer, tensors_of

THERE, EXPERTS, HOME = "there", "experts", "home"


class Leg(NamedTuple):
    """One step of a rank in a pass: it sends rows there or home, or computes its experts, of one piece.

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


def record_experts(size: LayerSize, dispatch: Dispatch, ranks: int, per_node: int, dtype: str) -> ExpertTrace:
    """Return the trace of a layer of experts, without computing or sending anything.

    per_node: ranks of a node of the cluster, whatever two hops take for one
    Raises UnmatchedError for ranks that would hang.
    """
    made = [_record_rank(size, dispatch, ranks, per_node, getattr(torch, dtype), rank) for rank in range(ranks)]
    forward, backward = (Pass(tuple(each[0][at] for each in made), 0) for at in (0, 1))
    for run in (forward, backward):
        match(run)
    return ExpertTrace(forward, backward, tuple(legs for _, legs in made))


def prove_experts(size: LayerSize, dispatch: Dispatch, ranks: int, per_node: int | None = None) -> float:
    """Return the largest relative error in float64 of outputs and gradients against one rank that has all experts.

    Sizes are small ones with as many experts; ranks are threads of this process.
    """
    small = LayerSize(size.experts, 4 * size.experts, 8, 8, size.skew)
    expected = [_alone(small, rank, ranks) for rank in range(ranks)]
    of_weights = [sum(gradients) for gradients in zip(*(each[3:] for each in expected), strict=True)]
    local, worst = size.experts // ranks, 0.0
    for rank, found in enumerate(in_process(ranks, partial(_of_rank, small, dispatch), per_node)):
        mine = slice(rank * local, (rank + 1) * local)
        theirs = [*expected[rank][:3], *of_weights[: size.experts][mine], *of_weights[size.experts :][mine]]
        for ours, its in zip(found, theirs, strict=True):
            worst = max(worst, float((ours - its).abs().max() / its.abs().max()))
    return worst


def _of_rank(size: LayerSize, dispatch: Dispatch, fabric: Fabric) -> list[Tensor]:
    held = tensors_of(size, dispatch, fabric.rank, fabric.size, torch.float64, torch.device("cpu"))
    return RoutedLayer(fabric, size, dispatch, held, LOOP).run()


def _alone(size: LayerSize, rank: int, ranks: int) -> list[Tensor]:
    """Return what the rows of a rank give with all experts on it."""
    held = [tensors_of(size, STOCK, each, ranks, torch.float64, torch.device("cpu")) for each in range(ranks)]
    first = tuple(chain.from_iterable(each.first for each in held))
    second = tuple(chain.from_iterable(each.second for each in held))
    mine = held[rank]._replace(first=first, second=second)
    return RoutedLayer(SingleFabric(), size, STOCK, mine, LOOP).run()


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
    size: LayerSize, dispatch: Dispatch, ranks: int, per_node: int, dtype: torch.dtype, rank: int
) -> tuple[tuple[tuple[Step, ...], tuple[Step, ...]], tuple[tuple[Leg, ...], tuple[Leg, ...]]]:
    held = tensors_of(size, dispatch, rank, ranks, dtype, torch.device("meta"))
    recorder = Recorder(*held.rows, *held.probs, *held.gradients, *held.weights)
    notes, passes, legs = _Notes(recorder), [], []
    fabric = RecordingFabric(recorder, tuple(range(ranks)), rank, per_node)
    layer = RoutedLayer(fabric, size, dispatch, held, LOOP, lambda inside, between: _Noted(inside, between, notes))
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
        if leg.what == EXPERTS:
            if not leg.flops:
                continue
            leg = leg._replace(piece=next(each.piece for each in marks[number:] if each.what == HOME))
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
