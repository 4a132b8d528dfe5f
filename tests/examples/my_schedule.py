"""A pipeline schedule of one's own: each rank runs two forwards, then two backwards, in turn."""

from megatron_cp.pipeline import Rule
from megatron_cp.pipeline.action import Action
from megatron_cp.pipeline.schedules.order import in_order


def two_and_two(p: int, m: int, v: int = 1) -> list[list[Action]]:
    """Return the compute actions of each of `p` ranks for `m` microbatches; this rule has one chunk per rank.

    Ranks before the last start with so many forwards that none waits for a gradient that cannot exist yet.
    """
    return [_in_pairs(*in_order(rank, m), warmup=2 * (p - 1 - rank)) for rank in range(p)]


def _in_pairs(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """Run `warmup` forwards, then pairs of forwards and pairs of backwards in turn."""
    actions = forwards[:warmup]
    rest = forwards[warmup:]
    for first in range(0, len(backwards), 2):
        actions += rest[first : first + 2] + backwards[first : first + 2]
    return actions


RULE = Rule(name="two-and-two", table=two_and_two, paper="", what="two forwards, two backwards, in turn", split=False)
