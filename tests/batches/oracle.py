"""The shortest step of a small problem by HiGHS: a mixed-integer program over slots, groups and documents.

FlexSP solves it for one microbatch and bucketed lengths (arXiv:2412.01523, 4.1); here all slots of a step are in one
program, on the true lengths.
"""

from collections import Counter
from itertools import pairwise
from math import inf
from typing import NamedTuple

from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array


class Found(NamedTuple):
    """Seconds that no step goes below, and True if they are those of a step."""

    bound: float
    proved: bool


class Program:
    """A mixed-integer program that grows by variables of at least 0 and by rows low <= sum <= high."""

    def __init__(self):
        self._costs, self._most, self._whole = [], [], []
        self._rows, self._low, self._high = [], [], []

    def variable(self, most=inf, cost=0.0, whole=True):
        """Add a variable; its number is returned."""
        self._costs.append(cost)
        self._most.append(most)
        self._whole.append(whole)
        return len(self._costs) - 1

    def row(self, terms, low=-inf, high=inf):
        """Add a row; `terms` are factors by the numbers of variables."""
        self._rows.append(terms)
        self._low.append(low)
        self._high.append(high)

    def least(self, seconds):
        """Minimise the cost for at most so many seconds."""
        entries = [(row, column, factor) for row, terms in enumerate(self._rows) for column, factor in terms.items()]
        rows, columns, factors = zip(*entries, strict=True)
        matrix = coo_array((factors, (rows, columns)), shape=(len(self._rows), len(self._costs)))
        result = milp(
            self._costs,
            integrality=self._whole,
            bounds=Bounds(0, self._most),
            constraints=LinearConstraint(matrix.tocsr(), self._low, self._high),
            options={"time_limit": seconds},
        )
        return Found(result.mip_dual_bound or 0.0, result.status == 0)


def shortest_step(one, slots, seconds):
    """Minimise the time of a step of at most `slots` slots that begin on all ranks at once.

    Groups have a place wherever ranks are free, so that it may be shorter than any plan.
    """
    assert one.lockstep
    assert one.stages == 1
    program = Program()
    counts = sorted(Counter(one.lengths).items(), reverse=True)
    held = {length: [] for length, _ in counts}
    times = [_add_slot(program, one, counts, held) for _ in range(slots)]
    for first, second in pairwise(times):
        # slots are interchangeable
        program.row({first: 1, second: -1}, low=0)
    for length, number in counts:
        program.row(dict.fromkeys(held[length], 1), low=number, high=number)
    found = program.least(seconds)
    return found._replace(bound=found.bound + one.after)


def _add_slot(program, one, counts, held):
    """Add the groups that a slot may have; the variable of its time is returned."""
    time = program.variable(cost=1.0, whole=False)
    ranks, work = {}, {time: -one.ranks}
    for degree, rate in one.rates:
        before = None
        for _ in range(min(one.ranks // degree, len(one.lengths))):
            opened = program.variable(most=1)
            columns = {
                length: program.variable(most=number) for length, number in counts if length <= degree * one.capacity
            }
            for length, column in columns.items():
                held[length].append(column)
            tokens = {column: length for length, column in columns.items()}
            program.row({opened: -degree * one.capacity, **tokens}, high=0)
            for kernels in (1.0, 0.0) if rate.exchange else (1.0,):
                seconds = {column: rate.least(length, kernels) for length, column in columns.items()}
                program.row({time: -1, opened: rate.fixed, **seconds}, high=0)
                if kernels:
                    work |= {opened: degree * rate.fixed, **{each: degree * of for each, of in seconds.items()}}
            if before:
                # groups of one degree are interchangeable
                program.row(before | {column: -length for column, length in tokens.items()}, low=0)
            ranks[opened], before = degree, tokens
    program.row(ranks, high=one.ranks)
    # follows from the rows above for whole groups, and not for parts of them
    program.row(work, high=0)
    return time
