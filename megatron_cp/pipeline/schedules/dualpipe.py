"""DualPipe of DeepSeek-V3 (arXiv:2412.19437, 3.2.1), and DualPipeV, which is one half of it on the V.

DualPipeV on the second of two ranks with 5 microbatches, which holds stages 1 and 2 (steps 1, 3, 5 and 7 are of the
other ranks):

    step 2   1F0 2F0 1F1 2F1
    step 4   1F2 2B0 2F2+1B0   1F3+2B1 2F3+1B1   1F4+2B2 2F4+1B2
    step 6   2B3 1B3 2I4 1I4
    step 8   2W4 1W4

In DualPipe two copies of the model go through the same ranks, one down and one up. The two ranks that are equally far
from the ends do what one rank of DualPipeV does: what this one calls its first chunk is their stage of the pipe that
starts at their end, and its second chunk their stage of the other pipe.
"""

from collections import deque
from collections.abc import Iterator

from megatron_cp.pipeline.action import FORWARD, FULL, INPUT, WEIGHT, Action, Cell, Overlap
from megatron_cp.pipeline.placement import vee
from megatron_cp.pipeline.schedules.chimera import shared_out

KindChunk = tuple[str, int]


def dualpipe_v(p: int, m: int, v: int = 2, overlapped: bool = False) -> list[list[Cell]]:
    """Return the eight steps of DualPipe. Needs m >= 2p.

    Idle p - 1 chunk times for equal times and without overlap, peak 2p + 1 chunks.
    overlapped: write a forward and the backward that DualPipe runs beside it as one action
    """
    return [_count(_steps(rank, p, m), stages, overlapped) for rank, stages in enumerate(vee(p).of_rank)]


def dualpipe(p: int, m: int, v: int = 1, overlapped: bool = False) -> list[list[Cell]]:
    """Return the eight steps of DualPipe for two pipes. Needs even p and m, m >= 2p.

    Idle (p / 2 - 1) T_F for equal times and without overlap, peak p + 1.
    """
    empty = shared_out(p, m)
    orders: list[list[Cell]] = []
    for rank, (down, up) in enumerate(empty.placement.of_rank):
        from_end, near, far = (rank, down, up) if rank < p // 2 else (p - 1 - rank, up, down)
        starts = (empty.micros_of(near).start, empty.micros_of(far).start)
        orders.append(_count(_steps(from_end, p // 2, m // 2), (near, far), overlapped, starts))
    return orders


def _steps(rank: int, p: int, m: int) -> Iterator[tuple[KindChunk, ...]]:
    """Yield (kind, chunk) in order, two of them where they overlap; W takes the oldest input gradient that waits."""
    beyond = p - 1 - rank
    steady = m - 2 * p + rank + 1
    # step 1: forwards of the first chunk, until the first one has come back up the V
    yield from [((FORWARD, 0),)] * (2 * beyond)
    # step 2: forwards of both chunks in turn
    yield from [((FORWARD, 0),), ((FORWARD, 1),)] * (rank + 1)
    # step 3: the first backwards, split so that the rank before gets its gradient early
    yield from [((INPUT, 1),), ((WEIGHT, 1),), ((FORWARD, 1),)] * beyond
    # step 4: the steady state, both chunks forward and backward
    for number in range(steady):
        if number == 0 and beyond == 0:
            # the next F of this rank waits for this one alone: apart they leave less idle time
            yield from [((FORWARD, 0),), ((FULL, 1),)]
        else:
            yield (FORWARD, 0), (FULL, 1)
        yield (FORWARD, 1), (FULL, 0)
    # step 5: no forwards of the first chunk are left
    yield from [((FULL, 1),), ((FORWARD, 1), (FULL, 0))] * beyond
    # step 6: the last backwards, the second half of them split
    yield from ((kind,) for kind in _drain(rank))
    # step 7: weight gradients between the input gradients that arrive
    yield from [((WEIGHT, 0),), ((INPUT, 0),)] * beyond
    # step 8: the weight gradients that are left
    yield from [((WEIGHT, 0),)] * (rank + 1)


def _drain(rank: int) -> Iterator[KindChunk]:
    """Yield backwards of both chunks in turn, split from the middle of the step on."""
    whole = rank + 1
    for place in range(2 * (rank + 1)):
        yield (FULL if place < whole else INPUT), 1 - place % 2


def _count(
    steps: Iterator[tuple[KindChunk, ...]], stages: tuple[int, ...], overlapped: bool, starts: tuple[int, int] = (0, 0)
) -> list[Cell]:
    """Number each chunk's forwards and backwards in microbatch order from its start; a W belongs to the oldest I."""
    forwards, backwards = list(starts), list(starts)
    waiting: deque[Action] = deque()
    cells: list[Cell] = []
    for step in steps:
        actions = []
        for kind, chunk in step:
            if kind == WEIGHT:
                actions += [waiting.popleft()] if waiting else []
                continue
            counts = forwards if kind == FORWARD else backwards
            actions.append(Action(stages[chunk], kind, counts[chunk]))
            counts[chunk] += 1
            if kind == INPUT:
                waiting.append(actions[-1]._replace(kind=WEIGHT))
        cells += [Overlap(*actions)] if overlapped and len(actions) == 2 else actions
    return cells
