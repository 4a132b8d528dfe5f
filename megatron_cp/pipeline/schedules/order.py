"""Orders of one rank's forwards and backwards that several rules share."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

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


def in_order(stage: int, m: int, split: bool = False) -> tuple[list[Action], list[Action]]:
    """Return all forwards and all backwards of one stage in microbatch order; with `split` the backwards are I's."""
    backward = input_gradient if split else full
    return [forward(stage, micro) for micro in range(m)], [backward(stage, micro) for micro in range(m)]


def in_groups(stages: Sequence[int], m: int, group: int, split: bool) -> tuple[list[Action], list[Action]]:
    """Return groups of `group` microbatches, each through all of the rank's stages, backwards through them reversed.

    The last group may be smaller (PTD-P, arXiv:2104.04473, section 2.2).
    """
    backward = input_gradient if split else full
    groups = [range(start, min(start + group, m)) for start in range(0, m, group)]
    forwards = [forward(stage, micro) for micros in groups for stage in stages for micro in micros]
    backwards = [backward(stage, micro) for micros in groups for stage in reversed(stages) for micro in micros]
    return forwards, backwards
