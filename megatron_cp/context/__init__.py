"""The menu of context-parallel backends. Pure: a backend's loop is imported with its first use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_cp.context.loop import Loop
from megatron_cp.errors import Refused
from megatron_cp.grid import Grid, team_sizes
from megatron_cp.registry import Registry


@dataclass(frozen=True)
class Backend:
    """One context-parallel algorithm.

    load:     import the algorithm's loop
    layout:   which positions its loop wants on a rank; None takes Megatron's zigzag as it comes
    moves:    what travels, per rank and layer, in elements of one of K or V (U = s b g d), Uq = s b h d
    needs_grid: the degree of each axis comes from --hierarchical-context-parallel-sizes
    chunks:   whether `fpdt` can cut its work over time: it takes any mask over any positions
    takes_grid: the same where these are given; without them the loop chooses
    teams:    whether the inner axis is a team, whose size squared has to divide the ranks
    placed:   whether --cp-placement says which axis exchanges heads
    weighed:  whether `auto` weighs it: a loop that is there for its speed, not for its memory or what it shows
    """

    name: str
    load: Callable[[], Loop[Any]]
    paper: str
    what: str
    moves: str
    aliases: tuple[str, ...] = ()
    layout: str | None = None
    needs_grid: bool = False
    chunks: bool = True
    takes_grid: bool = False
    teams: bool = False
    placed: bool = False
    weighed: bool = True

    def check_grid(self, grid: Grid) -> None:
        """Raise ValueError for a grid that the algorithm cannot take."""
        ranks = grid.inner * grid.outer
        if self.teams and grid.inner not in (possible := team_sizes(ranks)):
            raise Refused(
                f"backend {self.name!r} needs context_parallel_size divisible by the square of its teams' size, the "
                f"inner hierarchical size, got {ranks} and {grid.inner}; possible are "
                f"{', '.join(map(str, possible))}, backend 'wallfacer' takes any"
            )

    def check_placement(self, placement: str) -> None:
        """Raise ValueError for a placement other than the first where it would have no effect."""
        if not self.placed and placement != next(iter(PLACEMENTS)):
            placed = " or ".join(repr(entry.name) for entry in BACKENDS if entry.placed)
            raise Refused(
                f"placement says which axis exchanges heads, got {placement!r} with backend {self.name!r}, which "
                f"does not ask; use backend {placed} or leave it out"
            )


def _ring() -> Loop[Any]:
    from megatron_cp.context.algorithms import ring

    return ring


def _bidirectional() -> Loop[Any]:
    from megatron_cp.context.algorithms import bidirectional

    return bidirectional


def _all_gather() -> Loop[Any]:
    from megatron_cp.context.algorithms import all_gather

    return all_gather


def _ulysses() -> Loop[Any]:
    from megatron_cp.context.algorithms import ulysses

    return ulysses


def _usp() -> Loop[Any]:
    from megatron_cp.context.algorithms import usp

    return usp


def _double_ring() -> Loop[Any]:
    from megatron_cp.context.algorithms import double_ring

    return double_ring


def _tokenring() -> Loop[Any]:
    from megatron_cp.context.algorithms import tokenring

    return tokenring


def _distflash() -> Loop[Any]:
    from megatron_cp.context.algorithms import distflash

    return distflash


def _fpdt() -> Loop[Any]:
    from megatron_cp.context.algorithms.fpdt import FPDT

    return FPDT()


def _rsa() -> Loop[Any]:
    from megatron_cp.context.algorithms import rsa

    return rsa


def _wallfacer() -> Loop[Any]:
    from megatron_cp.context.algorithms import wallfacer

    return wallfacer


def _startrail() -> Loop[Any]:
    from megatron_cp.context.algorithms import startrail

    return startrail


def _auto() -> Loop[Any]:
    raise AssertionError("auto has no loop of its own: nothing is chosen yet")


AUTO = "auto"

BACKENDS = Registry(
    "context-parallel backend",
    [
        Backend(
            "zigzag",
            _ring,
            "arXiv:2310.01889 on the head-tail layout",
            "ring of K and V, balanced under a causal mask",
            "2(p-1)U, causal 3/4 of it",
            aliases=("p2p",),
        ),
        Backend(
            "bidirectional",
            _bidirectional,
            "arXiv:2310.01889 on the head-tail layout",
            "ring of K and V both ways, early halves up and late ones down",
            "2(p-1)U, half of it each way, causal 3/4 of it",
        ),
        Backend(
            "ring",
            _ring,
            "arXiv:2310.01889",
            "ring of K and V over contiguous pieces",
            "2(p-1)U, causal 1/2 of it on average",
            layout="contiguous",
        ),
        Backend(
            "striped",
            _ring,
            "arXiv:2311.09431",
            "ring of K and V, every p-th token on a rank",
            "2(p-1)U",
            layout="striped",
        ),
        Backend(
            "all-gather",
            _all_gather,
            "arXiv:2407.21783, 3.3.2",
            "every rank gathers K and V, group by group of KV heads",
            "2(p-1)U, causal 3/4 of it",
            aliases=("all_gather", "allgather"),
        ),
        Backend(
            "ulysses",
            _ulysses,
            "arXiv:2309.14509",
            "heads for tokens and back",
            "(p-1)/p (2Uq + 2U)",
            aliases=("a2a",),
        ),
        Backend(
            "usp",
            _usp,
            "arXiv:2405.07719",
            "Ulysses on one axis, ring on the other",
            "(u-1)/u (2Uq + 2U) + 2(r-1)U, p = u r",
            aliases=("a2a+p2p",),
            needs_grid=True,
            placed=True,
        ),
        Backend(
            "double-ring",
            _double_ring,
            "arXiv:2406.18485",
            "rings of K and V inside windows of ranks, and between the windows meanwhile",
            "2W(w-1)U inside + 2(W-1)U between, p = w W, causal 3/4 of it",
            aliases=("double_ring",),
            needs_grid=True,
        ),
        Backend(
            "tokenring",
            _tokenring,
            "arXiv:2412.20501",
            "ring of queries, partial results straight home",
            "2(p-1)Uq, causal 3/4 of it",
        ),
        Backend(
            "distflash",
            _distflash,
            "arXiv:2310.03294",
            "early ranks help late ones, everything lent directly",
            "causal (3p-2)/4 U + p/4 Uq, about pU + Uq where KV heads are shared; full 2(p-1)U",
            layout="contiguous",
            chunks=False,
        ),
        Backend(
            "fpdt",
            _fpdt,
            "arXiv:2408.16978",
            "Ulysses in chunks over time, what waits lies in host memory",
            "(p-1)/p (2Uq + 2U)",
            weighed=False,
        ),
        Backend(
            "rsa",
            _rsa,
            "arXiv:2105.13120",
            "ring of K, then of V, over whole rows of scores; takes a bias, shows probabilities",
            "2(p-1)U, causal 3/4 of it",
            weighed=False,
        ),
        Backend(
            "wallfacer",
            _wallfacer,
            "arXiv:2407.00611, tiles of arXiv:2512.20968",
            "queries of a row of ranks meet keys of a column of ranks",
            "(a-1)(2Uq + Us) + 2(c-1)U, p = a c",
            takes_grid=True,
        ),
        Backend(
            "startrail",
            _startrail,
            "arXiv:2407.00611",
            "teams of C ranks gather queries and keys, keys of teams go around C rings",
            "(C-1)(2Uq + 2U + Us) + 2U p/C, C² divides p",
            takes_grid=True,
            teams=True,
        ),
        Backend(
            AUTO,
            _auto,
            "the cost model of megatron-cp trace",
            "the fastest of the others for these sizes on a cluster, and says why",
            "as the one it takes",
            takes_grid=True,
            weighed=False,
        ),
    ],
)

ALGORITHMS = [entry.name for entry in BACKENDS if entry.name != AUTO]
"""The backends that are a loop of their own."""

PLACEMENTS = {"head-first": "inner", "context-first": "outer"}
