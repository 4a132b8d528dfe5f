"""Sums over tiles in float32 (float64 for float64): the results of tiles and of other ranks are added here.

On a GPU several partial results wait for one kernel, which reads each once; elsewhere torch adds each as it comes. A
partial result that covers all rows and stays the only one is the result as it came.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_cp.comm.fabric import size_in_bytes
from megatron_cp.context.packing import with_dim
from megatron_cp.context.partials import MOST_PARTS, Partial, accumulator_dtype, fuse, hull, merging_for

__all__ = ["SoftmaxMerge", "Sum", "accumulator_dtype", "widening"]


def widening(tensor: Tensor) -> int:
    """Return how many of its elements are as large as one of the accumulator."""
    return accumulator_dtype(tensor).itemsize // tensor.dtype.itemsize


class _Total:
    """The accumulator of partial results, and those that wait to be added to it."""

    SPARE = 0
    """Results whose memory torch would take for temporaries, and which parts may take instead."""

    def __init__(self, like: Tensor, total: tuple[Tensor, ...] | None = None) -> None:
        self._like, self._total = like, total
        self._waiting: list[Partial] = []
        self._rows, self._waiting_bytes = like.shape[0], 0
        self._merging = merging_for(like)
        waiting = self._merging.waiting
        self._most_waiting = waiting and max(waiting, self.SPARE * size_in_bytes(like))

    def _put(self, rows: slice, *tensors: Tensor) -> None:
        start, stop, _ = rows.indices(self._rows)
        part = Partial(slice(start, stop), tensors)
        self._waiting.append(part)
        self._waiting_bytes += part.bytes
        if self._waiting_bytes > self._most_waiting and not self._alone():
            self._merge()

    def _alone(self) -> tuple[Tensor, ...]:
        """Return the only partial result so far, if it covers all rows."""
        alone = self._total is None and len(self._waiting) == 1 and self._is_whole(self._waiting[0])
        return self._waiting[0].tensors if alone else ()

    def _is_whole(self, part: Partial) -> bool:
        return part.rows == slice(0, self._rows)

    def _at(self, part: Partial, total: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the rows of the accumulator that a part is added to."""
        return total if self._is_whole(part) else tuple(x[part.rows] for x in total)

    def _merge(self) -> tuple[Tensor, ...]:
        """Add up what waits, and return the accumulator."""
        self._waiting_bytes = 0
        if alone := self._alone():
            self._total, self._waiting = _wide(alone), []
        while self._waiting:
            if self._merging.fused:
                self._fuse()
                continue
            part = self._waiting.pop(0)
            if self._total is None and self._is_whole(part):
                self._total = _wide(part.tensors)
            else:
                self._add_by_torch(self._started(), part)
        return self._started()

    def _fuse(self) -> None:
        """Add as many parts as fit one launch."""
        if self._total is None:
            parts, self._waiting = self._waiting[:MOST_PARTS], self._waiting[MOST_PARTS:]
            self._total = self._empty(accumulator_dtype(self._like))
            fuse(parts, self._total, stand_in=self._merging.stand_in)
        else:
            parts, self._waiting = self._waiting[: MOST_PARTS - 1], self._waiting[MOST_PARTS - 1 :]
            rows = hull(parts)
            here = tuple(x[rows] for x in self._total)
            fuse([Partial(rows, here), *parts], here, rows.start, stand_in=self._merging.stand_in)

    def _rounded(self) -> tuple[Tensor, ...]:
        """Return the sum with its first tensor in the dtype of the result; the last launch rounds."""
        if not self._alone() and self._merging.fused:
            while len(self._waiting) > MOST_PARTS - (self._total is not None):
                self._fuse()
            if self._waiting:
                before = [] if self._total is None else [Partial(slice(0, self._rows), self._total)]
                result = self._empty(self._like.dtype)
                fuse([*before, *self._waiting], result, stand_in=self._merging.stand_in)
                return result
        first, *rest = self._alone() or self._merge()
        return first.to(self._like.dtype), *rest

    def _started(self) -> tuple[Tensor, ...]:
        if self._total is None:
            self._total = self._empty(accumulator_dtype(self._like))
            for x, value in zip(self._total, (0.0, -torch.inf), strict=False):
                x.fill_(value)
        return self._total

    def _empty(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Allocate the tensors of a sum, the first one in this dtype."""
        raise NotImplementedError

    def _add_by_torch(self, total: tuple[Tensor, ...], part: Partial) -> None:
        raise NotImplementedError


class SoftmaxMerge(_Total):
    """Online-softmax merge of attention over disjoint sets of keys.

    l = logaddexp(l1, l2), o = o1 + sigmoid(l2 - l1) (o2 - o1); rows that have seen no key keep o = 0, l = -inf.
    Source: Rabe and Staats 2021, arXiv:2112.05682; Milakov and Gimelshein 2018, arXiv:1805.02867.
    """

    # a float32 copy of a bfloat16 part
    SPARE = 2

    def __init__(self, q: Float[Tensor, "s b h d"], value_dim: int | None = None) -> None:
        # values may be narrower or wider than queries and keys
        super().__init__(q if value_dim is None else with_dim(q, value_dim))

    def add(self, rows: slice, out: Float[Tensor, "r b h dv"], lse: Float[Tensor, "r b h"]) -> None:
        """Merge attention of the queries in `rows` over some more keys; the merge keeps the tensors."""
        self._put(rows, out, lse)

    def room(self, rows: slice) -> list[Tensor]:
        """Buffers for another rank's result over these rows."""
        shape = (rows.stop - rows.start, *self._like.shape[1:])
        return [self._like.new_empty(shape), self._like.new_empty(shape[:3], dtype=accumulator_dtype(self._like))]

    def result(self) -> tuple[Float[Tensor, "s b h dv"], Float[Tensor, "s b h"]]:
        """out in the dtype of the queries, lse in the accumulator's."""
        out, lse = self._rounded()
        return out, lse

    def _empty(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows, batch, heads, _ = self._like.shape
        # b h s, as the kernels of the backward pass read it
        lse = self._like.new_empty((batch, heads, rows), dtype=accumulator_dtype(self._like)).permute(2, 0, 1)
        return self._like.new_empty(self._like.shape, dtype=dtype), lse

    def _add_by_torch(self, total: tuple[Tensor, ...], part: Partial) -> None:
        (out, lse), (sums, log_sums) = part.tensors, self._at(part, total)
        # -inf minus -inf is nan: rows that no key has met on either side are 0 on both, and any share of them is
        share = (lse - log_sums).nan_to_num_(nan=0.0).sigmoid_()
        sums.lerp_(out.to(sums.dtype), share.unsqueeze(-1))
        torch.logaddexp(log_sums, lse, out=log_sums)


class Sum(_Total):
    """A sum over slices of dim 0 of a tensor shaped like `like`.

    `total` is an earlier sum, not rounded, to go on from; it is added to in place.
    """

    def __init__(self, like: Tensor, total: Tensor | None = None) -> None:
        super().__init__(like, None if total is None else (total,))

    def add(self, rows: slice, part: Tensor) -> None:
        """Add `part` to `rows`; the sum keeps it."""
        self._put(rows, part)

    def room(self, rows: slice, *, exact: bool = False) -> list[Tensor]:
        """Allocate a buffer for another rank's part of these rows, in the accumulator's dtype if it comes `exact`."""
        dtype = accumulator_dtype(self._like) if exact else self._like.dtype
        return [self._like.new_empty((rows.stop - rows.start, *self._like.shape[1:]), dtype=dtype)]

    def result(self) -> Tensor:
        """Return the sum, rounded once to the dtype of `like`."""
        return self._rounded()[0]

    def exact(self) -> Tensor:
        """Return the sum, not rounded."""
        return self._merge()[0]

    def _empty(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (self._like.new_empty(self._like.shape, dtype=dtype),)

    def _add_by_torch(self, total: tuple[Tensor, ...], part: Partial) -> None:
        self._at(part, total)[0].add_(part.tensors[0])


def _wide(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(accumulator_dtype(x)) for x in tensors)
