"""LM head and embedding over all ranks of the pipeline (arXiv:2411.05288): every rank has a share of the vocabulary.

The output of the last stage goes to all ranks. S computes a rank's logits and their statistics, T its weight gradients,
and between them all ranks wait for each other. With one barrier S also computes the rank's part of the gradient that
the last stage's backward begins with, before the statistics of the others are known; with two barriers T does. Rank r
of p runs, in its round n,

    one barrier     F n, S n - a, B n - (p - r), T n - a - 1
    two barriers    F n, S n - a, T n - a - 1, B n - (p + 1 - r)

where a = floor((p - 1 - r) T_F / P + 1), P being the time of a round, lets S run on all ranks at about the same time.
With backwards in two halves, I takes the place of B, and W trails it by r rounds as in ZB-H1 (arXiv:2401.10241).
What the first stage begins with is the sum of what all ranks look up, two microbatches ahead; its gradient goes to all
ranks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import floor
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.pipeline.action import (
    BACKWARD,
    FORWARD,
    LOGITS,
    LOGITS_BACK,
    REDUCE,
    SHARE,
    SHARE_E,
    SUM_S,
    SUM_T,
    Action,
    Cell,
    forward,
    full,
    input_gradient,
    weight_gradient,
)
from megatron_cp.pipeline.costs import Costs
from megatron_cp.pipeline.placement import Placement
from megatron_cp.pipeline.schedule import Schedule

BARRIERS = (1, 2)


class Vocabulary(NamedTuple):
    """How the vocabulary is shared out.

    barriers: per microbatch, 1 or 2
    share:    T_F as a part of all that a rank computes of one microbatch
    """

    barriers: int
    share: float = 1 / 3


def check_barriers(barriers: int) -> None:
    """Raise ValueError for a number of barriers that the head over all ranks does not have."""
    if barriers not in BARRIERS:
        raise Refused(f"a vocabulary over all ranks takes 1 or 2 barriers, got {barriers}")


def shared_out(barriers: int, placement: Placement, costs: Costs | None) -> Vocabulary:
    """Return the vocabulary for stages of these costs, on average; without them F is a third of the work."""
    check_barriers(barriers)
    if costs is None:
        return Vocabulary(barriers)
    return Vocabulary(barriers, sum(costs.forward) / sum(costs.work(placement)))


def rounds(rank: int, p: int, m: int, vocabulary: Vocabulary, split: bool = False) -> Iterator[Action]:
    """Yield what a rank with one stage runs, in order. Peaks are p - r + 1 and p - r + 2 for one and two barriers.

    split: backwards in two halves; peaks are then p + 1 and p + 2 on every rank where all activations wait for W
    """
    barriers, share = vocabulary
    late = floor((p - 1 - rank) * share + 1)
    returns = p - rank if barriers == 1 else p + 1 - rank
    logits = Action(rank, LOGITS), late
    logits_back = Action(rank, LOGITS_BACK), late + 1
    backward = (input_gradient if split else full)(rank, 0), returns
    order = [(forward(rank, 0), 0), logits]
    order += [backward, logits_back] if barriers == 1 else [logits_back, backward]
    if split:
        order.append((weight_gradient(rank, 0), returns + rank))
    for number in range(m + max(lag for _, lag in order)):
        for action, lag in order:
            if 0 <= number - lag < m:
                yield action._replace(micro=number - lag)


def rounds_of_evaluation(rank: int, p: int, m: int) -> Iterator[Action]:
    """Yield what a rank with one stage runs where nothing is trained: all ranks' S at about the same time."""
    late = p - 1 - rank
    for number in range(m + late):
        if number < m:
            yield forward(rank, number)
        if number >= late:
            yield Action(rank, LOGITS, number - late)


def add_sums(schedule: Schedule) -> Schedule:
    """Return the lowered schedule with what all ranks send each other, in the order of microbatches on every rank.

    SHARE brings the output of the last stage to the others, SUM_S adds up what their S made, and where there are two
    barriers SUM_T what their T made. A rank asks for the next output before it works on the last one. SHARE_E brings
    the gradient of the embedding to all ranks behind the S that is next on the first rank: S runs on all ranks at about
    the same time. The last ones come at the end, before the reductions.
    """
    if not schedule.barriers:
        return schedule
    returned = returned_before(schedule.table[0])
    return replace(schedule, table=tuple(tuple(_summed(schedule, cells, returned)) for cells in schedule.table))


def returned_before(cells: Iterable[Cell]) -> dict[int | None, list[int | None]]:
    """Return the microbatches whose B the first rank has run before each S, after the S before; None: at the end."""
    found: dict[int | None, list[int | None]] = {None: []}
    for cell in cells:
        _, kind, micro = cell if isinstance(cell, Action) else cell.forward
        if kind in BACKWARD:
            found[None].append(micro)
        elif kind == LOGITS:
            found[micro], found[None] = found[None], []
    return found


def _summed(schedule: Schedule, cells: Iterable[Cell], returned: dict[int | None, list[int | None]]) -> Iterator[Cell]:
    last = len(schedule.placement.rank_of) - 1
    cells = tuple(cells)
    reductions = [cell for cell in cells if isinstance(cell, Action) and cell.kind == REDUCE]
    makes = any(cell[:2] == (last, FORWARD) for cell in cells)
    for cell in cells:
        stage, kind, micro = cell if isinstance(cell, Action) else cell.forward
        if kind == REDUCE:
            continue
        if kind == LOGITS and not makes:
            assert micro is not None
            for wanted in range(micro + 1 if micro else 0, min(micro + 2, schedule.micros)):
                yield Action(stage, SHARE, wanted)
        yield cell
        if kind == FORWARD and stage == last:
            yield Action(stage, SHARE, micro)
        if kind == LOGITS:
            yield Action(stage, SUM_S, micro)
            yield from (Action(stage, SHARE_E, other) for other in returned[micro])
        if kind == LOGITS_BACK and schedule.barriers == 2:
            yield Action(stage, SUM_T, micro)
    yield from (Action(stage, SHARE_E, other) for other in returned[None])
    yield from reductions


def with_head(costs: Costs, time: float, ranks: int, barriers: int = 0, pipes: int = 1) -> Costs:
    """Return the costs of stages with an LM head behind the last one.

    time:     of its forward for one microbatch; logits, input gradient and weight gradient take as long each
    barriers: of a head over all ranks; 0 for one on the last rank
    pipes:    each of which has a head on its last stage
    Raises ValueError for a time below 0.
    """
    if time < 0:
        raise Refused(f"the time of the LM head cannot be negative, got {time:g}")
    if barriers:
        part = time / ranks
        return replace(costs, head=(2 * part, part) if barriers == 1 else (part, 2 * part))

    def behind(times: tuple[float, ...]) -> tuple[float, ...]:
        length = len(times) // pipes
        return tuple(each + time * ((stage + 1) % length == 0) for stage, each in enumerate(times))

    return replace(costs, forward=behind(costs.forward), input=behind(costs.input), weight=behind(costs.weight))
