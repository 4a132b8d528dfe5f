"""1F1B without a flush, on weights in versions: PipeDream (arXiv:1806.03377) and PipeDream-2BW (arXiv:2006.09503).

While a batch comes back, ranks run forwards of the next one on weights that lack some updates. Batch t runs
on rank r, forward and backward, with the weights of max(t - behind[r], 0) updates. A step is all backwards of one
batch, so that it has one update, and ends with ahead[r] forwards of later batches in flight. Rank 0 of 4, m = 4:

    the first step         F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3
    one in the middle               F3 B0 F4 B1 F5 B2 F6 B3      F4 is the next batch's first forward
    the last step                   F3 B0 B1 B2 B3
"""

from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.pipeline.action import Action, forward, full
from megatron_cp.pipeline.schedules.order import alternate


class StepOfRun(NamedTuple):
    """Which step of a run: the usual one has others before and after it.

    first: no forward is in flight when it begins
    left:  steps to come, this one included; None for many
    """

    first: bool = False
    left: int | None = None


USUAL = StepOfRun()


class Ends(NamedTuple):
    """Forwards of each stage that are in flight when a step begins, and when it ends."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class Delay(NamedTuple):
    """How far the ranks run ahead of the updates.

    ahead:  forwards of later batches that each rank has in flight between two steps
    behind: updates that the weights of a batch lack on each rank
    """

    ahead: tuple[int, ...]
    behind: tuple[int, ...]

    @property
    def versions(self) -> tuple[int, ...]:
        """Weights that each rank keeps, those that the optimizer updates included."""
        return tuple(count + 1 for count in self.behind)

    def ends(self, m: int, step: StepOfRun = USUAL) -> Ends:
        """Return what is in flight around a step of m microbatches."""
        return _ends(self.ahead, m, step)


def _ends(ahead: tuple[int, ...], m: int, step: StepOfRun) -> Ends:
    before = (0,) * len(ahead) if step.first else _that_end(ahead, m, step.left)
    return Ends(before, _that_end(ahead, m, None if step.left is None else step.left - 1))


def _that_end(ahead: tuple[int, ...], m: int, steps: int | None) -> tuple[int, ...]:
    """Return the forwards ahead without those of batches that never end."""
    return ahead if steps is None else tuple(min(count, steps * m) for count in ahead)


def two_versions(p: int, m: int) -> Delay:
    """PipeDream-2BW: all ranks one update behind. Raises ValueError for m < p - 1: a forward would come too early."""
    if m < p - 1:
        raise Refused(
            f"2bw needs m of at least p - 1 = {p - 1} microbatches, got m = {m}; take more, or pipedream, which keeps "
            "more versions"
        )
    return Delay(_ahead(p), (1,) * p)


def stashing(p: int, m: int) -> Delay:
    """PipeDream: the newest weights that a rank has at the forward, kept until the backward."""
    return Delay(_ahead(p), tuple(-(-count // m) for count in _ahead(p)))


def vertical_sync(p: int, m: int) -> Delay:
    """PipeDream with vertical sync: on all ranks the weights that the first one has at the forward."""
    return Delay(_ahead(p), (-(-(p - 1) // m),) * p)


def _ahead(p: int) -> tuple[int, ...]:
    return tuple(range(p - 1, -1, -1))


def without_flush(p: int, m: int, v: int = 1, step: StepOfRun = USUAL) -> list[list[Action]]:
    """Rank r runs p - 1 - r forwards ahead; forwards and backwards take turns. Peak p - r.

    Where every step waits for the update on all ranks: m(T_F + T_I + T_W) + (p - 1)(T_I + T_W), else without the last
    term.
    """
    ahead = _ahead(p)
    before, after = _ends(ahead, m, step)
    table = []
    for rank in range(p):
        forwards = [forward(rank, micro) for micro in range(before[rank], m + after[rank])]
        backwards = [full(rank, micro) for micro in range(m)]
        table.append(alternate(forwards, backwards, warmup=min(ahead[rank], after[rank] + m) - before[rank]))
    return table
