"""LM head and embedding over all ranks of the pipeline (arXiv:2411.05288): every rank has a share of the vocabulary.

The output of the last stage goes to all ranks. S computes a rank's logits and their statistics, T its weight gradients,
and between them all ranks wait for each other. With one barrier S also computes the rank's part of the gradient that
the last stage's backward begins with, before the statistics of the others are known; with two barriers T does. Rank r
of p runs, in its round n,

    one barrier     F n, S n - a, B n - (p - r), T n - a - 1
    two barriers    F n, S n - a, T n - a - 1, B n - (p + 1 - r)

where a = floor((p - 1 - r) T_F / P + 1), P being the time of a round, lets S run on all ranks at about the same time.
In the tables of other schedules `vocabulary_order` finds a place for S and T. What the first stage begins with is the
sum of what all ranks look up, two microbatches ahead; its gradient goes to all ranks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import floor
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.pipeline.action import BACKWARD, LOGITS, LOGITS_BACK, Action, Cell, flat, forward, full
from megatron_cp.pipeline.costs import LARGEST, Costs
from megatron_cp.pipeline.placement import Placement

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


def rounds(rank: int, p: int, m: int, vocabulary: Vocabulary) -> Iterator[Action]:
    """Yield what a rank with one stage runs, in order. Peaks are p - r + 1 and p - r + 2 for one and two barriers."""
    barriers, share = vocabulary
    late = floor((p - 1 - rank) * share + 1)
    returns = p - rank if barriers == 1 else p + 1 - rank
    logits = Action(rank, LOGITS), late
    logits_back = Action(rank, LOGITS_BACK), late + 1
    backward = full(rank, 0), returns
    order = [(forward(rank, 0), 0), logits]
    order += [backward, logits_back] if barriers == 1 else [logits_back, backward]
    for number in range(m + max(lag for _, lag in order)):
        for action, lag in order:
            if 0 <= number - lag < m:
                yield action._replace(micro=number - lag)


def returned_before(cells: Iterable[Cell]) -> dict[int | None, list[int | None]]:
    """Return the microbatches whose B the first stage has run before each S, after the S before; None: at the end."""
    found: dict[int | None, list[int | None]] = {None: []}
    for stage, kind, micro in flat(cells):
        if kind in BACKWARD and not stage:
            found[None].append(micro)
        elif kind == LOGITS:
            found[micro], found[None] = found[None], []
    return found


def with_head(costs: Costs, time: float, ranks: int, barriers: int = 0, pipes: int = 1) -> Costs:
    """Return the costs of stages with an LM head behind the last one.

    time:     of its forward for one microbatch; logits, input gradient and weight gradient take as long each
    barriers: of a head over all ranks; 0 for one on the last rank
    pipes:    each of which has a head on its last stage
    Raises ValueError for a time below 0.
    """
    if not 0 <= time <= LARGEST:
        raise Refused(f"the time of the LM head cannot be negative, got {time:g}; the largest is {LARGEST:g}")
    if barriers:
        part = time / ranks
        return replace(costs, head=(2 * part, part) if barriers == 1 else (part, 2 * part))

    def behind(times: tuple[float, ...]) -> tuple[float, ...]:
        length = len(times) // pipes
        return tuple(each + time * ((stage + 1) % length == 0) for stage, each in enumerate(times))

    return replace(costs, forward=behind(costs.forward), input=behind(costs.input), weight=behind(costs.weight))
