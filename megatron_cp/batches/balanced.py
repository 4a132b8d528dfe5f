"""Our own plan: slots built from the longest document down, each filled up to the time that its longest document takes.

A document gets the cheapest degree, of any number of ranks, that its memory and the time of its slot allow. Slots are
filled by first fit decreasing and then packed as tightly as their documents allow (MULTIFIT: Coffman, Garey and
Johnson, 1978). Of several such plans, and of the two baselines, the one whose step is shortest is taken: with pipeline
stages by the schedule's simulation, where slots of like time win.
Where documents are few, the shortest slots of all, or of some at a time, are then found by dynamic programming.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from megatron_cp.batches.assign import Split
from megatron_cp.batches.blast import consecutive, counts, dealt
from megatron_cp.batches.homogeneous import homogeneous
from megatron_cp.batches.place import place
from megatron_cp.batches.plan import Share, placed
from megatron_cp.batches.polish import FEW, polished
from megatron_cp.batches.problem import BatchProblem, GroupRate
from megatron_cp.batches.static import static

NAME = "balanced"
LONGER = (1.0, 1.3, 2.0)
"""Times of a slot to try, over what its longest document takes: longer slots are fewer."""
EVEN = 1.05
"""Time of slots that are all equal, over the mean that their work asks for."""
HALVINGS = 6
"""Steps of the search for the shortest time of a slot."""
CLOSE = 0.003
"""Share of a slot's time at which the search ends."""


class Choice(NamedTuple):
    """A degree for a document: rank seconds that it adds to a group, and seconds if it is alone in one."""

    cost: float
    degree: int
    alone: float


type Choices = Mapping[int, Sequence[Choice]]


def balanced(problem: BatchProblem) -> Sequence[Sequence[Share]]:
    """Return the slots of the shortest step of those that are tried."""
    choices = {length: _choices(problem, length) for length in dict.fromkeys(problem.lengths)}
    best = min(_candidates(problem, choices), key=lambda slots: placed(NAME, problem, slots).seconds)
    if len(problem.lengths) > FEW or problem.stages > 1:
        return best
    return polished(NAME, problem, best)


def _choices(problem: BatchProblem, length: int) -> list[Choice]:
    """Return the degrees that hold a document, cheapest first."""
    return sorted(
        Choice(degree * (problem.alone(length, degree) - rate.fixed), degree, problem.alone(length, degree))
        for degree, rate in problem.rates
        if degree * problem.capacity >= length
    )


def _candidates(problem: BatchProblem, choices: Choices) -> Iterator[list[tuple[Share, ...]]]:
    yield static(problem)
    yield homogeneous(problem)
    least = {length: found[0].alone for length, found in choices.items()}
    for longer in LONGER:
        yield _built(problem, choices, {length: longer * alone for length, alone in least.items()})
    work = [choices[length][0].cost for length in problem.lengths]
    fastest = max(min(choice.alone for choice in found) for found in choices.values())
    for count in counts(problem):
        # slots of one time for all
        time = max(fastest, EVEN * (sum(work) / problem.ranks / count + min(rate.fixed for _, rate in problem.rates)))
        yield _built(problem, choices, dict.fromkeys(choices, time))
    for count in counts(problem):
        for divided in (dealt(problem, count, work), consecutive(problem, count)):
            splits = [_tightest(problem, choices, slot) for slot in divided or ()]
            if divided is not None and all(splits):
                yield [split.shares for split in splits if split]


def _built(problem: BatchProblem, choices: Choices, limits: Mapping[int, float]) -> list[tuple[Share, ...]]:
    """Return slots that each hold the longest document left, and then as many others as its time has room for.

    limits: seconds of a slot by the length of its longest document
    """
    left, slots = list(problem.longest_first), []
    while left:
        longest = problem.lengths[left[0]]
        groups, rest = _fill(problem, choices, left, limits[longest])
        inside = {at for group in groups for at in group.documents}
        split = Split(max(group.seconds() for group in groups), tuple(group.share for group in groups))
        if split.seconds > min(choice.alone for choice in choices[longest]):
            taken = [at for at in left if at in inside]
            split = _tightest(problem, choices, taken, split) or split
        slots.append(split.shares)
        left = rest
    return slots


def _tightest(
    problem: BatchProblem, choices: Choices, documents: Sequence[int], known: Split | None = None
) -> Split | None:
    """Return the groups of one slot with these documents, longest first, whose slowest is fastest; None without room.

    known: such a split, to begin with
    """
    lengths = [problem.lengths[at] for at in documents]
    work = sum(choices[length][0].cost for length in lengths) / problem.ranks
    low = max(work, max(min(choice.alone for choice in choices[length]) for length in lengths))
    best = known
    high = known.seconds if known else 4 * low
    for _ in range(HALVINGS):
        if high - low < CLOSE * low:
            break
        middle = (low + high) / 2
        groups, left = _fill(problem, choices, documents, middle)
        if left:
            low = middle
            continue
        high = max(group.seconds() for group in groups)
        best = Split(high, tuple(group.share for group in groups))
    return best


class _OpenGroup:
    """A group that is being filled; `room` in tokens."""

    __slots__ = ("degree", "documents", "exchange", "fixed", "room", "square", "squares", "token", "tokens")

    def __init__(self, degree: int, rate: GroupRate, room: int) -> None:
        self.degree, self.room = degree, room
        self.fixed, self.token, self.square, self.exchange = rate
        self.documents: list[int] = []
        self.tokens = self.squares = 0

    def seconds(self, more: int = 0, square: int = 0) -> float:
        """Return the seconds of its documents, and of one more; written out for speed, as `GroupRate.seconds`."""
        tokens = self.tokens + more
        attention, transfers = self.square * (self.squares + square), self.exchange * tokens
        return self.fixed + self.token * tokens + (attention if attention > transfers else transfers)

    @property
    def share(self) -> Share:
        return Share(self.degree, tuple(self.documents))

    def add(self, at: int, length: int) -> None:
        self.documents.append(at)
        self.tokens += length
        self.squares += length * length
        self.room -= length


def _fill(
    problem: BatchProblem, choices: Choices, documents: Sequence[int], limit: float
) -> tuple[list[_OpenGroup], list[int]]:
    """Return groups of one slot that end by `limit`, and the documents that have no room in it.

    Documents come longest first. Each goes to the first group that it fits, else to a new one of its cheapest degree.
    """
    groups: list[_OpenGroup] = []
    left: list[int] = []
    free = problem.ranks
    for at in documents:
        length = problem.lengths[at]
        square = length * length
        for group in groups:
            if length <= group.room and group.seconds(length, square) <= limit:
                group.add(at, length)
                break
        else:
            degree = next((choice.degree for choice in choices[length] if choice.alone <= limit), problem.ranks + 1)
            if degree <= free and (problem.aligned or _has_place(problem, groups, degree)):
                opened = _OpenGroup(degree, problem.rate[degree], degree * problem.capacity)
                opened.add(at, length)
                groups.append(opened)
                free -= degree
            else:
                left.append(at)
    return groups, left


def _has_place(problem: BatchProblem, groups: Sequence[_OpenGroup], degree: int) -> bool:
    degrees = [group.degree for group in groups] + [degree]
    return place(degrees, problem.ranks, problem.per_node) is not None
