"""DualPipeV: DeepSeek-V3's DualPipe (arXiv:2412.19437) cut in half, one direction on the V."""

from collections import deque
from collections.abc import Iterator

from megatron_cp.pipeline.action import FORWARD, FULL, INPUT, WEIGHT, Action
from megatron_cp.pipeline.placement import vee


def dualpipe_v(p: int, m: int, v: int = 2) -> list[list[Action]]:
    """The eight phases of DualPipe; forward and backward that it overlaps run one after the other here.

    Idle p - 1 chunk times for equal times, peak 2p + 1 chunks. Needs m >= 2p.
    """
    return [_count(_kinds(rank, p, m), stages) for rank, stages in enumerate(vee(p).of_rank)]


def _kinds(rank: int, p: int, m: int) -> Iterator[tuple[str, int]]:
    """(kind, chunk) in order; W takes the oldest input gradient that waits."""
    beyond = p - 1 - rank
    yield from [(FORWARD, 0)] * (2 * beyond)
    yield from [(FORWARD, 0), (FORWARD, 1)] * (rank + 1)
    yield from [(INPUT, 1), (WEIGHT, 1), (FORWARD, 1)] * beyond
    yield from [(FORWARD, 0), (FULL, 1), (FORWARD, 1), (FULL, 0)] * (m - 2 * p + rank + 1)
    yield from [(FULL, 1), (FORWARD, 1), (FULL, 0)] * beyond
    yield from _drain(rank)
    yield from [(WEIGHT, 0), (INPUT, 0)] * beyond
    yield from [(WEIGHT, 0)] * (rank + 1)


def _drain(rank: int) -> Iterator[tuple[str, int]]:
    """Backwards of both chunks in turn, split from the middle of the phase on."""
    whole = rank + 1
    for place in range(2 * (rank + 1)):
        yield (FULL if place < whole else INPUT), 1 - place % 2


def _count(kinds: Iterator[tuple[str, int]], stages: tuple[int, ...]) -> list[Action]:
    forwards, backwards = [0, 0], [0, 0]
    waiting: deque[Action] = deque()
    actions = []
    for kind, chunk in kinds:
        if kind == WEIGHT:
            if waiting:
                actions.append(waiting.popleft())
            continue
        counts = forwards if kind == FORWARD else backwards
        actions.append(Action(stages[chunk], kind, counts[chunk]))
        counts[chunk] += 1
        if kind == INPUT:
            waiting.append(actions[-1]._replace(kind=WEIGHT))
    return actions
