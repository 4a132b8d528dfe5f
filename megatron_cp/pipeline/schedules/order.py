"""Orders of one rank's forwards and backwards that several rules share."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise

from megatron_cp.pipeline.action import INPUT, WEIGHT, Action, forward, full, input_gradient


def alternate(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> list[Action]:
    """Return `warmup` forwards, then one forward and one backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return [*forwards[:warmup], *steady, *backwards[len(forwards) - warmup :]]


def delay_weights(actions: Iterable[Action], delay: int) -> Iterator[Action]:
    """Let the oldest waiting W follow every I from number `delay` (from 0) on; the rest of them come at the end."""
    waiting: deque[Action] = deque()
    for action in actions:
        yield action
        if action.kind == INPUT:
            waiting.append(Action(action.stage, WEIGHT, action.micro))
            if len(waiting) > delay:
                yield waiting.popleft()
    yield from waiting


def in_order(stage: int, m: int, split: bool = False, slices: int = 1) -> tuple[list[Action], list[Action]]:
    """Return all forwards and all backwards of one stage in microbatch order; with `split` the backwards are I's.

    With several slices, slice i of sequence j is microbatch j * slices + i, and backwards of one sequence come in the
    reverse order (Seq1F1B, arXiv:2406.03488): keys of a slice get gradients from all later ones.
    """
    backward = input_gradient if split else full
    backwards = [backward(stage, micro) for micros in sequences(m, slices) for micro in reversed(micros)]
    return [forward(stage, micro) for micro in range(m * slices)], backwards


def sequences(m: int, slices: int) -> list[range]:
    """Return the microbatches of each sequence: its slices in order."""
    return [range(first, first + slices) for first in range(0, m * slices, slices)]


def in_groups(
    stages: Sequence[int], m: int, group: int, split: bool, slices: int = 1
) -> tuple[list[Action], list[Action]]:
    """Return groups of `group` microbatches, each through all of the rank's stages, backwards through them reversed.

    The last group may be smaller (PTD-P, arXiv:2104.04473, section 2.2). With several slices, backwards come in
    the reverse order of the forwards of a sequence, or of the few that fill one group together.
    """
    backward = input_gradient if split else full
    if slices > 1:
        passes = [
            [(stage, micro) for micros in _cut(micros_of, group) for stage in stages for micro in micros]
            for micros_of in joined(m, slices, group)
        ]
        forwards = [forward(*each) for each in chain.from_iterable(passes)]
        return forwards, [backward(*each) for sequences_of in passes for each in reversed(sequences_of)]
    groups = [range(start, min(start + group, m)) for start in range(0, m, group)]
    forwards = [forward(stage, micro) for micros in groups for stage in stages for micro in micros]
    backwards = [backward(stage, micro) for micros in groups for stage in reversed(stages) for micro in micros]
    return forwards, backwards


def joined(m: int, slices: int, group: int) -> list[range]:
    """Return the microbatches of sequences that go through the chunks together: one, or as many as fill a group.

    With fewer slices than ranks one sequence alone would leave ranks waiting at every turn of the loop.
    """
    parts = max(1, m // -(-group // slices))
    ends = [m * number // parts * slices for number in range(parts + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


def _cut(micros: range, group: int) -> list[range]:
    """Cut into groups of equal size, at least `group` where there are as many."""
    parts = max(1, len(micros) // group)
    ends = [len(micros) * number // parts for number in range(parts + 1)]
    return [micros[start:end] for start, end in pairwise(ends)]
