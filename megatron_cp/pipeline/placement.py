"""Placement of stages on ranks. A stage is a model part in global order, a chunk its number on its rank."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Placement:
    """The rank of every stage; `of_rank` lists a rank's stages in chunk order."""

    name: str
    rank_of: tuple[int, ...]

    @cached_property
    def ranks(self) -> int:
        """p: ranks of the pipeline."""
        return max(self.rank_of) + 1

    @cached_property
    def chunks(self) -> int:
        """v: stages of one rank."""
        return len(self.rank_of) // self.ranks

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


PLACEMENTS: dict[str, Callable[[int, int], Placement]] = {"loop": loop, "v": vee}
