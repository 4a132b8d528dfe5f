"""Memo of the fastest dispatch for each bucket of tokens (Tutel, arXiv:2206.03382, section 3.3).

Tutel tries every choice once where the tokens of a layer come into a bucket that it has not seen, and keeps the
fastest. Here costs say it at once, or steps are measured: each choice has `tries` of them, the fastest by costs first.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_cp.experts.degree import WeighedDispatch
from megatron_cp.experts.dispatch_cost import Dispatch

BUCKET = 128
"""Numbers of tokens that have one choice."""

MOST = 256
"""Most buckets that are remembered; the one that was not asked for longest is forgotten first."""


class TokenBucket:
    """Choices for some numbers of tokens.

    ways:     by costs, fastest first
    measured: the least seconds of a step with each of them, as far as they have been tried
    said:     True once the choice has been told
    """

    def __init__(self, ways: Sequence[WeighedDispatch], tries: int) -> None:
        self.ways, self.measured = ways, [float("inf")] * len(ways)
        self._tries, self._noted, self.said = tries, 0, False

    @property
    def settled(self) -> bool:
        """True if all choices have been tried, or none is."""
        return self._noted == self._tries * len(self.ways)

    @property
    def now(self) -> int:
        """The choice that a step takes: the one that is tried, or the fastest."""
        # costs leave the first one, for none is measured
        return self.measured.index(min(self.measured)) if self.settled else self._noted // self._tries

    def note(self, seconds: float) -> None:
        """Note the seconds of a step with the choice that is tried."""
        self.measured[self.now] = min(self.measured[self.now], seconds)
        self._noted += 1

    def __str__(self) -> str:
        if not self._tries:
            return ", ".join(map(str, self.ways))
        steps = sorted(zip(self.measured, self.ways, strict=True), key=lambda each: each[0])
        return ", ".join(f"{way.dispatch} {seconds * 1e3:.3g} ms" for seconds, way in steps)


class TakenDispatch(NamedTuple):
    """The choice of a step, and one line where it has just been settled for its bucket."""

    dispatch: Dispatch
    why: str = ""


class DispatchMemo:
    """Remembers the choice of each bucket.

    weigh: returns all choices for a number of tokens, fastest first
    tries: steps that are measured with each choice; 0 where costs choose
    """

    def __init__(self, weigh: Callable[[int], Sequence[WeighedDispatch]], tries: int = 0) -> None:
        self._weigh, self._tries = weigh, tries
        self._buckets: OrderedDict[int, TokenBucket] = OrderedDict()
        self._last: TokenBucket | None = None

    def take(self, tokens: int, seconds: float) -> TakenDispatch:
        """Return the choice for a step; ranks that give the same numbers take the same.

        tokens:  of a rank in a microbatch, at most
        seconds: of the step before
        """
        if self._last is not None and not self._last.settled:
            self._last.note(seconds)
        self._last = bucket = self._bucket(tokens)
        dispatch = bucket.ways[bucket.now].dispatch
        if bucket.said or not bucket.settled:
            return TakenDispatch(dispatch)
        bucket.said = True
        return TakenDispatch(dispatch, f"up to {bucket_of(tokens)} tokens of a rank: {dispatch}, of {bucket}")

    def _bucket(self, tokens: int) -> TokenBucket:
        key = bucket_of(tokens)
        if key not in self._buckets:
            self._buckets[key] = TokenBucket(self._weigh(key), self._tries)
            if len(self._buckets) > MOST:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return self._buckets[key]


def bucket_of(tokens: int) -> int:
    """Return the most tokens that share a choice with so many."""
    return max(1, -(-tokens // BUCKET)) * BUCKET
