"""How tokens travel to experts: weigh the ways that a split allows, and say what becomes of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_cp.errors import Refused
from megatron_cp.experts import EXCHANGES, WEIGHTS
from megatron_cp.experts.degree import WeighedDispatch
from megatron_cp.experts.dispatch_cost import ALLGATHER, STOCK, Dispatch
from megatron_cp.pipeline import SCHEDULES
from megatron_cp.planner.work import RankConfig, mixture_seconds

ALONE = "each rank has all experts of a layer, and no token travels"


def candidates(rank: RankConfig, exchanges: Sequence[str], pieces: Sequence[int]) -> Iterator[Dispatch]:
    """Yield the ways that training has in this split: Megatron's dispatchers first, then our exchanges, and pieces.

    exchanges: ours to weigh beside Megatron's, names in EXCHANGES
    pieces:    numbers of pieces to weigh beside whole microbatches
    """
    parallel = rank.parallel
    # TransformerEngine's experts, which plans have, are not cut where weight gradients wait
    split = parallel.schedule is not None and SCHEDULES.get(parallel.schedule).split
    whole = parallel.precision == "fp8" or rank.model.routing.padded or split
    yield STOCK
    # rows of copies are dealt out by the alltoall dispatcher
    if not parallel.expert_copies.asked:
        yield STOCK._replace(dispatcher=ALLGATHER)
    if parallel.ep == 1:
        return
    asked = [EXCHANGES.get(name) for name in exchanges]
    # groups call experts as often as pieces do, and are not of experts whose ranks gather their rows
    together = whole or parallel.expert_tp > 1
    yield from (
        STOCK._replace(comm_type=each.name) for each in asked if each.pieces == 1 and not (together and each.groups)
    )
    for number in (number for number in pieces if number > 1 and not whole):
        yield STOCK._replace(pieces=number)
        # two pieces are in one order
        taken = (entry.name for entry in asked if entry.ahead is not None or number > 2)
        yield from (STOCK._replace(comm_type=name, pieces=number) for name in taken)


def weighed(rank: RankConfig, exchanges: Sequence[str], pieces: Sequence[int]) -> list[WeighedDispatch]:
    """Return the ways that the split allows, fastest first; of equal ones the first candidate."""
    found = []
    for one in candidates(rank, exchanges, pieces):
        try:
            seconds = mixture_seconds(rank.with_dispatch(one))
        except Refused:
            # nodes with different numbers of the ranks that share experts
            continue
        found.append(WeighedDispatch(one, seconds))
    return sorted(found, key=lambda one: one.seconds)


def dispatch_why(rank: RankConfig, exchanges: Sequence[str], pieces: Sequence[int]) -> str:
    """Return one line on the way of tokens in a split, and on the others that were weighed."""
    if rank.expert_ranks.all == 1:
        return ALONE
    first, *others = weighed(rank, exchanges, pieces)
    beside = f", {', '.join(map(str, others))}" if others else ""
    what = f"{first.seconds * 1e3:.3g} ms for the experts of a layer and microbatch and their exchange"
    return f"tokens travel to experts by {first.dispatch}: {what}{beside}{_with_weights(rank, first.dispatch)}"


def _with_weights(rank: RankConfig, way: Dispatch) -> str:
    """Return what gathering weights in the place of tokens would take; empty where no ranks share an expert."""
    if rank.expert_ranks.tensor == 1 or way.dispatcher == ALLGATHER or way.gather == WEIGHTS:
        return ""
    seconds = mixture_seconds(rank.with_dispatch(way._replace(gather=WEIGHTS)))
    return f"; {seconds * 1e3:.3g} ms with --moe-gather {WEIGHTS}, with --transformer-impl local"


class RoutedShare(NamedTuple):
    """Rows of experts beside what tokens ask for.

    dropped: share of the choices that no expert takes; below 0 where inputs are padded
    uneven:  rows of the busiest rank over the mean
    """

    dropped: float
    uneven: float

    def __str__(self) -> str:
        what = f"{self.dropped:.1%} of tokens' choices dropped"
        if round(self.dropped, 3) < 0:
            what = f"{-self.dropped:.1%} more rows than tokens' choices, of padding"
        return f"{what}; the busiest rank has {self.uneven:.2f} times the mean"


def dispatch_line(rank: RankConfig) -> str:
    """Return one line on the way of tokens in a run and on what becomes of their choices."""
    way = f"tokens travel to experts by {rank.dispatch}" if rank.expert_ranks.all > 1 else ALONE
    return f"{way}; {routed_share(rank)}"


def routed_share(rank: RankConfig) -> RoutedShare:
    """Return what becomes of the choices of a rank's tokens in a mixture layer."""
    rows = rank.routed
    return RoutedShare(1 - rows.mean / rank.model.top_k, rows.busiest / rows.mean)
