"""Steps at whose end islands average their weights: every H-th, where H may change during a run.

One number is Local SGD; the whole run in one number is one-shot averaging. `1:1,1001:8` is post-local SGD
(arXiv:1808.07217), `1:64,1001:16,5001:4` averages ever more often (Parallel SGD, arXiv:1606.07365).
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.units import is_whole


class Phase(NamedTuple):
    """Steps from `first` on, numbered from 1, of which every `every`-th ends in a sync, counted from `first`."""

    first: int
    every: int


# asked again in every step
@lru_cache(32)
def phases_of(text: str) -> tuple[Phase, ...]:
    """Read `H` or `STEP:H,STEP:H…`; ValueError for what is neither."""
    pairs = [part.split(":") for part in (text if ":" in text else f"1:{text}").split(",")]
    if not all(len(pair) == 2 and all(map(is_whole, pair)) for pair in pairs):
        raise Refused(f"--local-sgd-steps is H or STEP:H,STEP:H, numbers of steps, got {text!r}; write 8 or 1:1,1001:8")
    phases = tuple(Phase(int(first), int(every)) for first, every in pairs)
    if any(phase.every < 1 for phase in phases):
        raise Refused(f"--local-sgd-steps {text}: islands take at least one step between two syncs; write 1 or more")
    firsts = [phase.first for phase in phases]
    if firsts[0] != 1 or any(first >= after for first, after in pairwise(firsts)):
        raise Refused(
            f"--local-sgd-steps {text}: the first phase begins at step 1 and every other after the one before"
        )
    return phases


def syncs(phases: Sequence[Phase], step: int) -> bool:
    """Return True where the islands average at the end of a step, the first of which is 1.

    The last step before another phase is a sync as well.
    """
    now = max((phase for phase in phases if phase.first <= step), key=lambda phase: phase.first)
    return (step - now.first + 1) % now.every == 0 or any(phase.first == step + 1 for phase in phases)


def is_read(step: int, last: int | None, every: Sequence[int]) -> bool:
    """Return True for a step after which weights are read: the last one, or one of those in each so many."""
    return step == last or any(step % each == 0 for each in every)
