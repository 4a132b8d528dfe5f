"""Placement `flexmoe`: copies that follow the load step by step (FlexMoE, arXiv:2304.03946).

While the load is uneven the plan in force is changed by the move that saves most: expand gives an expert of the busiest
rank one more copy, in a free slot or in the place of another copy; shrink takes a copy away; migrate moves one. All
changes of a plan are weighed at once, by what each of them adds to the load of the one or two experts that it concerns.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_cp.experts.slots import Counts, SlotCosts, SlotLoad, SlotPlan, expert_load, load_of

EVEN = 1.05
"""Rows of the busiest rank over the mean, up to which the plan is left as it is."""

PATIENCE = 1000
"""Changes that are looked at without a faster plan before the way ends."""

DIGITS = 9
"""Significant digits of a comparison: sums and differences of fractions are equal but for rounding."""

NEAR = 1e-7
"""Relative difference below which numbers may be equal in so many digits."""

type Floats = NDArray[np.float64]
type Ints = NDArray[np.int64]
type Bools = NDArray[np.bool_]


class SlotChange(NamedTuple):
    """A copy that comes, where an expert is named, and one that goes."""

    comes: tuple[int, int] | None
    goes: tuple[int, int] | None


def propose(plan: SlotPlan, counts: Counts, costs: SlotCosts) -> SlotPlan:
    """Return the fastest plan on the way of best moves from the plan in force; itself where the load is even.

    The way goes on through plans that are slower, for a while (PATIENCE), and comes to none twice.
    """
    load, without = load_of(plan, counts), 0
    best, lowest = plan, _key(load, costs)
    if load.uneven <= EVEN:
        return plan
    way = _Way(plan, counts)
    while without < PATIENCE:
        changes = _Changes(plan, load)
        new = way.leads_to_new_plans(changes)
        if not len(new):
            break
        first = new[_lowest(changes.weighed(way.rows, load, costs, new))]
        change = changes.change(first)
        after = _applied(plan, change)
        plan, load = after, _loaded(plan, after, load, counts, change)
        way.goes_on(change)
        key = _key(load, costs)
        without += len(new)
        if key < lowest:
            best, lowest, without = plan, key, 0
    return best


class _Way:
    """Plans that the way has come through, by a word for each: the exclusive or of the random words of its copies.

    rows: of each rank for each expert, [experts, ranks]
    """

    def __init__(self, plan: SlotPlan, counts: Counts) -> None:
        slots = plan.slots
        self.rows: Floats = np.array(counts, dtype=np.float64).T.copy()
        # the last expert stands for no copy
        self._words = _words(slots.experts, slots.ranks)
        self._word = np.int64(0)
        for rank, hosted in enumerate(plan.hosted):
            for expert in hosted:
                self._word ^= self._words[expert, rank]
        self._seen = [self._word]

    def leads_to_new_plans(self, changes: "_Changes") -> Ints:
        """Return the numbers of the changes after which the plan is none of those before."""
        words = self._word ^ self._words[*changes.comes] ^ self._words[*changes.goes]
        return np.flatnonzero(~np.isin(words, self._seen))

    def goes_on(self, change: SlotChange) -> None:
        """Note the plan after a change."""
        for copy in change:
            if copy:
                self._word ^= self._words[copy]
        self._seen.append(self._word)


@lru_cache(8)
def _words(experts: int, ranks: int) -> Ints:
    words = np.random.default_rng(0).integers(1, 1 << 63, size=(experts + 1, ranks))
    words[experts] = 0
    return words


class _Changes:
    """Changes of a plan: all copies may go; experts of the busiest ranks may come, in a free slot or in a copy's place.

    comes, goes: expert and rank of each change, [2, changes]; the number of experts stands for none
    """

    def __init__(self, plan: SlotPlan, load: SlotLoad) -> None:
        slots = plan.slots
        self.none, ranks = slots.experts, np.arange(slots.ranks)
        copies: Ints = np.array(
            [(expert, rank) for rank in ranks for expert in plan.hosted[rank]], dtype=np.int64
        ).reshape(-1, 2)
        of_copy, where = copies.T
        self.homes = np.arange(slots.experts) // (slots.experts // slots.ranks)
        self.has: Bools = self.homes[:, None] == ranks
        self.has[of_copy, where] = True
        busiest, drawing = (column.index(max(column)) for column in (load.rows, load.arriving))
        concerned = np.flatnonzero(self.has[:, busiest] | self.has[:, drawing])
        free = np.array([len(hosted) < slots.spare for hosted in plan.hosted])
        takes = free & ~self.has[concerned]
        freed = (where == ranks[:, None]) & ~self.has[concerned][:, :, None]
        moved = (of_copy == concerned[:, None])[:, None, :] & takes[:, :, None]
        # in order of experts and ranks, and a free slot before other copies' places
        expert, rank, place = np.nonzero(np.concatenate([takes[:, :, None], freed | moved], axis=2))
        nothing = np.array([[self.none, 0]])
        given_up = np.concatenate([nothing, copies])[place]
        self.comes: Ints = np.concatenate(
            [np.repeat(nothing, len(copies), 0), np.stack([concerned[expert], rank], 1)]
        ).T
        self.goes: Ints = np.concatenate([copies, given_up]).T

    def change(self, number: Any) -> SlotChange:
        """Return one change."""
        comes, goes = ((int(expert), int(rank)) for expert, rank in (self.comes[:, number], self.goes[:, number]))
        return SlotChange(None if comes[0] == self.none else comes, None if goes[0] == self.none else goes)

    def weighed(self, rows: Floats, load: SlotLoad, costs: SlotCosts, numbers: Ints) -> tuple[Floats, Floats]:
        """Return seconds, and the sum of squares of ranks' rows, after the changes of these numbers."""
        (coming, there), (going, here) = self.comes[:, numbers], self.goes[:, numbers]
        now: Floats = np.array(load, dtype=np.float64)
        after = np.repeat(now[:, None], len(numbers), axis=1)
        gains = np.flatnonzero(coming < self.none)
        then = self.has[coming[gains]]
        then[np.arange(len(gains)), there[gains]] = True
        # an expert that migrates changes once
        migrates = np.flatnonzero(coming[gains] == going[gains])
        then[migrates, here[gains][migrates]] = False
        after[:, gains] += self._more(rows, coming[gains], then)
        loses = np.flatnonzero((going < self.none) & (going != coming))
        then = self.has[going[loses]]
        then[np.arange(len(loses)), here[loses]] = False
        after[:, loses] += self._more(rows, going[loses], then)
        computed, leaving, arriving, lends, hosts = after
        travelling = np.maximum(leaving.max(1), arriving.max(1))
        copies = np.maximum(lends.max(1), hosts.max(1))
        seconds = computed.max(1) * costs.row + travelling * costs.sent + copies * costs.lent
        return seconds, (computed * computed).sum(1)

    def _more(self, rows: Floats, experts: Ints, then: Bools) -> Floats:
        """Return what the load of experts, [5, experts, ranks], grows by where `then` has them."""
        homes = self.homes[experts]
        return _load(rows[experts], then, homes) - _load(rows[experts], self.has[experts], homes)


def _load(rows: Floats, has: Bools, homes: Ints) -> Floats:
    """Return the columns of `SlotLoad` of experts, [5, experts, ranks], as `expert_load` has those of one."""
    number, each = has.sum(1), np.arange(len(has))
    leaving = np.where(has, 0.0, rows)
    arriving = np.where(has, (leaving.sum(1) / number)[:, None], 0.0)
    lends, hosts = np.zeros_like(leaving), has.astype(np.float64)
    lends[each, homes], hosts[each, homes] = number - 1, 0.0
    return np.stack([np.where(has, rows + arriving, 0.0), leaving, arriving, lends, hosts])


def _lowest(keys: tuple[Floats, Floats]) -> Any:
    """Return the first of the changes whose keys are the lowest in so many digits."""
    among = np.arange(len(keys[0]))
    for key in keys:
        values = key[among]
        among = among[values <= values.min() * (1 + NEAR)]
        values = key[among]
        digits = DIGITS - 1 - np.floor(np.log10(np.maximum(values, np.finfo(np.float64).tiny)))
        rounded = np.rint(values * 10.0**digits) / 10.0**digits
        among = among[rounded == rounded.min()]
    return among[0]


def _key(load: SlotLoad, costs: SlotCosts) -> tuple[float, float]:
    """Return what a move has to lower; where two ranks are the busiest, the one of them that it helps counts too."""
    squares = sum(rows * rows for rows in load.rows)
    return float(f"{load.seconds(costs):.{DIGITS}g}"), float(f"{squares:.{DIGITS}g}")


def _applied(plan: SlotPlan, change: SlotChange) -> SlotPlan:
    if change.goes:
        plan = plan.without_copy(*change.goes)
    return plan.with_copy(*change.comes) if change.comes else plan


def _loaded(plan: SlotPlan, after: SlotPlan, load: SlotLoad, counts: Counts, change: SlotChange) -> SlotLoad:
    """Return the load after a change, of whose experts alone it is computed."""
    for expert in sorted({copy[0] for copy in change if copy}):
        load = load.plus(expert_load(counts, expert, plan.hosts(expert)), -1)
        load = load.plus(expert_load(counts, expert, after.hosts(expert)))
    return load
