"""Bucket lengths: at most so many upper boundaries with the least total padding (FlexSP, arXiv:2412.01523, 4.1.3)."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate


def boundaries(lengths: Sequence[int], buckets: int) -> list[int]:
    """Return the upper boundaries of at most `buckets` buckets that minimise the sum of boundary minus length.

    A dynamic program over the distinct lengths; the best cut moves up with the end, so that a bucket more takes
    O(n log n).
    """
    counts = Counter(lengths)
    distinct = sorted(counts)
    number = [0, *accumulate(counts[length] for length in distinct)]
    tokens = [0, *accumulate(counts[length] * length for length in distinct)]

    def padding(start: int, stop: int) -> int:
        """Return the padding of one bucket of the distinct lengths start, …, stop - 1."""
        return distinct[stop - 1] * (number[stop] - number[start]) - (tokens[stop] - tokens[start])

    ends = range(1, len(distinct) + 1)
    least = [0, *(padding(0, stop) for stop in ends)]
    cuts: list[list[int]] = []
    for _ in range(min(buckets, len(distinct)) - 1):
        more, cut = [0] * (len(distinct) + 1), [0] * (len(distinct) + 1)
        # the ends lo..hi with their best cuts between the two given ones
        waiting = [(1, len(distinct), 0, len(distinct) - 1)]
        while waiting:
            low, high, first, last = waiting.pop()
            if low > high:
                continue
            stop = (low + high) // 2
            more[stop], cut[stop] = min(
                (least[start] + padding(start, stop), start) for start in range(first, min(last, stop - 1) + 1)
            )
            waiting += [(low, stop - 1, first, cut[stop]), (stop + 1, high, cut[stop], last)]
        least = more
        cuts.append(cut)
    stop, found = len(distinct), [distinct[-1]]
    for cut in reversed(cuts):
        stop = cut[stop]
        if stop == 0:
            break
        found.append(distinct[stop - 1])
    return found[::-1]


def rounded(lengths: Sequence[int], upper: Sequence[int]) -> list[int]:
    """Return the upper boundary of each length's bucket."""
    return [upper[bisect_left(upper, length)] for length in lengths]
