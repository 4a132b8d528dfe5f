"""Sums over tiles in float32 (float64 for float64): partial results come in low precision and are added here."""

import torch
from jaxtyping import Float
from torch import Tensor


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64 for float64, float32 for everything else."""
    return torch.promote_types(tensor.dtype, torch.float32)


class SoftmaxMerge:
    """Online-softmax merge of attention over disjoint sets of keys.

    The first result that covers all rows is taken over and merged into in place.
    l = logaddexp(l1, l2), o = o1 + sigmoid(l2 - l1) (o2 - o1); rows that have seen no key keep o = 0, l = -inf.
    Source: Rabe and Staats 2021, arXiv:2112.05682; Milakov and Gimelshein 2018, arXiv:1805.02867.
    """

    def __init__(self, q: Float[Tensor, "s b h d"]) -> None:
        self._q = q
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, rows: slice, out: Float[Tensor, "r b h d"], lse: Float[Tensor, "r b h"]) -> None:
        """Merge attention of the queries in `rows` over some more keys."""
        if self._out is None and out.shape[0] == self._q.shape[0]:
            self._out, self._lse = out.to(accumulator_dtype(out)), lse
            return
        total, log_sum = self._started()
        previous = log_sum[rows]
        # -inf minus -inf is nan: rows that no key has met on either side are 0 on both, and any share of them is
        share = (lse - previous).nan_to_num_(nan=0.0).sigmoid_()
        total[rows].lerp_(out.to(total.dtype), share[..., None])
        log_sum[rows] = torch.logaddexp(previous, lse)

    def room(self, rows: slice) -> list[Tensor]:
        """Buffers for another rank's result over these rows."""
        shape = (rows.stop - rows.start, *self._q.shape[1:])
        return [self._q.new_empty(shape), self._q.new_empty(shape[:3], dtype=accumulator_dtype(self._q))]

    def result(self) -> tuple[Float[Tensor, "s b h d"], Float[Tensor, "s b h"]]:
        """out in the dtype of the queries, lse in the accumulator's."""
        total, log_sum = self._started()
        return total.to(self._q.dtype), log_sum

    def _started(self) -> tuple[Tensor, Tensor]:
        if self._out is None or self._lse is None:
            dtype = accumulator_dtype(self._q)
            self._out = torch.zeros(self._q.shape, dtype=dtype, device=self._q.device)
            self._lse = torch.full(self._q.shape[:3], -torch.inf, dtype=dtype, device=self._q.device)
        return self._out, self._lse


class Sum:
    """A sum over slices of dim 0 of a tensor shaped like `like`; the first part that covers it all is taken over.

    `total` is an earlier sum, not rounded, to go on from; it is added to in place.
    """

    def __init__(self, like: Tensor, total: Tensor | None = None) -> None:
        self._like = like
        self._total = total

    def add(self, rows: slice, part: Tensor) -> None:
        """Add `part` to `rows`."""
        if self._total is None and part.shape == self._like.shape:
            self._total = part.to(accumulator_dtype(part))
        else:
            self.exact()[rows].add_(part)

    def room(self, rows: slice) -> list[Tensor]:
        """Allocate a buffer for another rank's part of these rows."""
        return [self._like.new_empty((rows.stop - rows.start, *self._like.shape[1:]))]

    def result(self) -> Tensor:
        """Return the sum, rounded once to the dtype of `like`."""
        return self.exact().to(self._like.dtype)

    def exact(self) -> Tensor:
        """Return the sum, not rounded."""
        if self._total is None:
            self._total = torch.zeros(self._like.shape, dtype=accumulator_dtype(self._like), device=self._like.device)
        return self._total
