"""Placement of stages on ranks. A stage is a model part in global order, a chunk its number on its rank."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from megatron_cp.errors import Refused


@dataclass(frozen=True)
class Placement:
    """The rank of every stage; `of_rank` lists a rank's stages in chunk order.

    pipes: copies of the model, each with microbatches of its own; the stages of one follow those of another
    """

    name: str
    rank_of: tuple[int, ...]
    pipes: int = 1

    @cached_property
    def ranks(self) -> int:
        """p: ranks of the pipeline."""
        return max(self.rank_of) + 1

    @cached_property
    def chunks(self) -> int:
        """v: stages of one rank in one pipe."""
        return self.length // self.ranks

    @cached_property
    def length(self) -> int:
        """Stages of one pipe, which are the parts of the model."""
        return len(self.rank_of) // self.pipes

    def first(self, stage: int) -> bool:
        """Return True if microbatches enter their pipe at `stage`."""
        return stage % self.length == 0

    def last(self, stage: int) -> bool:
        """Return True if microbatches turn round at `stage`, where their loss is."""
        return self.first(stage + 1)

    def pipe_of(self, stage: int) -> int:
        """Return the pipe to which `stage` belongs."""
        return stage // self.length

    @cached_property
    def of_rank(self) -> tuple[tuple[int, ...], ...]:
        """Stages of each rank, in chunk order."""
        return tuple(
            tuple(stage for stage, owner in enumerate(self.rank_of) if owner == rank) for rank in range(self.ranks)
        )


def loop(p: int, v: int = 1) -> Placement:
    """Put stage s on rank s mod p: Megatron's own placement (PTD-P, arXiv:2104.04473)."""
    return Placement("loop", tuple(stage % p for stage in range(p * v)))


def vee(p: int, v: int = 2) -> Placement:
    """Go down the ranks and up again: first and last stage share rank 0 (Zero Bubble, arXiv:2401.10241, section 6)."""
    down = tuple(range(p))
    return Placement("v", tuple(rank for chunk in range(v) for rank in (down[::-1] if chunk % 2 else down)))


def two_way(p: int, v: int = 1) -> Placement:
    """Put one copy of the model down the ranks and one up them, as Chimera (arXiv:2107.06925) and DualPipe do.

    Raises ValueError for an odd p.
    """
    if p % 2:
        raise Refused(
            f"two pipes in opposite directions need an even number of ranks, got p = {p}: the rank in the middle would "
            "hold both copies of one stage; take zb-v"
        )
    down = loop(p, v).rank_of
    return Placement("two-way", down + tuple(p - 1 - rank for rank in down), pipes=2)


ONE_PIPE: dict[str, Callable[[int, int], Placement]] = {"loop": loop, "v": vee}
PLACEMENTS: dict[str, Callable[[int, int], Placement]] = {**ONE_PIPE, "two-way": two_way}
