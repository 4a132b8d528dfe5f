"""The passes of FlashAttention-2 in Triton, with dropped weights: imported where they run only.

A program of the forward pass holds a block of queries and goes over the keys that any of them sees, with the maximum
and the sum of each row beside it (online softmax). The backward pass computes the scores again, once by blocks of
queries for dq and once by blocks of keys for dk and dv, over all query heads of a KV head. Sums are float32, products
of float32 inputs are not rounded to TensorFloat-32. Source: Dao 2023, arXiv:2307.08691, sections 3.1 and 3.2.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_cp.kernels.dropout import BITS, FIRST, SECOND, STEP, threshold
from megatron_cp.kernels.protocol import Window

FAR = 1 << 29
"""A limit of a window that is none: more tokens than a tile has."""
SIZES = ["queries", "keys", "pairs", "left", "right", "limit"]
"""Arguments for whose values a kernel is not compiled anew."""
STEP_ = tl.constexpr(STEP % 2**64)
FIRST_ = tl.constexpr(FIRST % 2**64)
SECOND_ = tl.constexpr(SECOND % 2**64)
DRAWN = tl.constexpr(64 - BITS)
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


class Blocks(NamedTuple):
    """Rows of queries and of keys in a program, and its warps."""

    rows: int
    warps: int


def blocks(dim: int, element_size: int) -> Blocks:
    """Return blocks that fit the shared memory of any GPU since Ampere, for heads of so many padded columns."""
    width = dim * element_size
    return Blocks(64, 4 if width <= 128 else 8) if width <= 256 else Blocks(32 if width <= 512 else 16, 4)


@triton.jit
def _rows_of(x, strides, batch, head, row, rows, column, columns):
    """Load some rows of one head of x [s b h d], with zeros outside."""
    start = x + batch.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]
    at = start + row.to(tl.int64)[:, None] * strides[0] + column[None, :]
    return tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _write_rows(x, strides, batch, head, row, rows, column, columns, values):
    """Round some rows of one head to the dtype of x [s b h d]."""
    start = x + batch.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]
    at = start + row.to(tl.int64)[:, None] * strides[0] + column[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _scores(q, k, row, key, queries, keys, left, right, scale):
    """Return the scaled scores of a block in units of log 2, -inf where the window hides a key."""
    # the last query has the position of the last key
    distance = key[None, :] - (row + keys - queries)[:, None]
    seen = (distance >= -left) & (distance <= right) & (key < keys)[None, :]
    return tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))


@triton.jit
def _kept(seeds, places, row, key, queries, keys, batch, head, group, heads, groups, batches, limit):
    """Return which weights of a block stay: SplitMix64 with the seed of each row [s b h] at each place [t b g]."""
    at_row = (row.to(tl.int64) * batches + batch) * heads + head
    at_key = (key.to(tl.int64) * batches + batch) * groups + group
    seed = tl.load(seeds + at_row, mask=row < queries, other=0).to(tl.uint64)
    place = tl.load(places + at_key, mask=key < keys, other=0).to(tl.uint64)
    x = seed[:, None] + ((place + 1) * STEP_)[None, :]
    x = (x ^ (x >> 30)) * FIRST_
    x = (x ^ (x >> 27)) * SECOND_
    x = x ^ (x >> 31)
    return (x >> DRAWN).to(tl.int32) >= limit


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    q, k, v, out, lse, seeds, places, q_strides, k_strides, v_strides, out_strides,
    queries, keys, pairs, left, right, limit, scale, factor, dim, value_dim, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    DROPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Compute out and lse [b h s] of a block of queries of one head."""
    pair, block = tl.program_id(0) % pairs, tl.program_id(0) // pairs
    batch, head = pair // HEADS, pair % HEADS
    group = head // (HEADS // GROUPS)
    first = block * ROWS
    row = first + tl.arange(0, ROWS)
    column, value_column = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    own = _rows_of(q, q_strides, batch, head, row, queries, column, dim)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, VALUE_DIM), tl.float32)
    # 1. the blocks of keys that any of these queries sees
    low = tl.maximum(first + keys - queries - left, 0) // ROWS * ROWS
    high = tl.minimum(first + ROWS + keys - queries + right, keys)
    for start in range(low, high, ROWS):
        key = start + tl.arange(0, ROWS)
        block_k = _rows_of(k, k_strides, batch, group, key, keys, column, dim)
        scores = _scores(own, block_k, row, key, queries, keys, left, right, scale)
        # 2. rescale what was added up under a smaller maximum
        new = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - shift[:, None])
        old = tl.exp2(top - shift)
        # 3. the softmax is of all weights, of which some are dropped
        total = total * old + tl.sum(weights, 1)
        if DROPS:
            kept = _kept(
                seeds, places, row, key, queries, keys, batch, head, group, HEADS, GROUPS, pairs // HEADS, limit
            )  # fmt: skip
            weights = tl.where(kept, weights, 0.0)
        block_v = _rows_of(v, v_strides, batch, group, key, keys, value_column, value_dim)
        sums = tl.dot(weights.to(block_v.dtype), block_v, sums * old[:, None], input_precision="ieee")
        top = new
    # 4. a row without any key gets out 0 and lse -inf
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    _write_rows(
        out, out_strides, batch, head, row, queries, value_column, value_dim, sums * (factor / total)[:, None]
    )  # fmt: skip
    result = tl.where(some, (top + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(lse + pair.to(tl.int64) * queries + row, result, mask=row < queries)


@triton.jit
def _slopes(
    q, k, v, dout, lse, delta, seeds, places, row, key, queries, keys, batch, head, group, pair, left, right, limit,
    scale, factor, HEADS: tl.constexpr, GROUPS: tl.constexpr, batches, DROPS: tl.constexpr,
):  # fmt: skip
    """Return the weights of a block, as the values meet them, and the gradient of its scores but for the scale."""
    at = pair.to(tl.int64) * queries + row
    row_lse = tl.load(lse + at, mask=row < queries, other=float("inf"))
    row_delta = tl.load(delta + at, mask=row < queries, other=0.0)
    scores = _scores(q, k, row, key, queries, keys, left, right, scale)
    weights = tl.exp2(scores - row_lse[:, None])
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
    dropped = weights
    if DROPS:
        kept = _kept(seeds, places, row, key, queries, keys, batch, head, group, HEADS, GROUPS, batches, limit)
        dropped = tl.where(kept, weights * factor, 0.0)
        dweights = tl.where(kept, dweights * factor, 0.0)
    return dropped, weights * (dweights - row_delta[:, None])


@triton.jit(do_not_specialize=SIZES)
def _queries_kernel(
    q, k, v, dout, lse, delta, dq, seeds, places, q_strides, k_strides, v_strides, dout_strides, dq_strides,
    queries, keys, pairs, left, right, limit, scale, factor, slope, dim, value_dim,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Compute dq of a block of queries of one head."""
    pair, block = tl.program_id(0) % pairs, tl.program_id(0) // pairs
    batch, head = pair // HEADS, pair % HEADS
    group = head // (HEADS // GROUPS)
    first = block * ROWS
    row = first + tl.arange(0, ROWS)
    column, value_column = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    own = _rows_of(q, q_strides, batch, head, row, queries, column, dim)
    own_dout = _rows_of(dout, dout_strides, batch, head, row, queries, value_column, value_dim)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    low = tl.maximum(first + keys - queries - left, 0) // ROWS * ROWS
    high = tl.minimum(first + ROWS + keys - queries + right, keys)
    for start in range(low, high, ROWS):
        key = start + tl.arange(0, ROWS)
        block_k = _rows_of(k, k_strides, batch, group, key, keys, column, dim)
        block_v = _rows_of(v, v_strides, batch, group, key, keys, value_column, value_dim)
        _, dscores = _slopes(
            own, block_k, block_v, own_dout, lse, delta, seeds, places, row, key, queries, keys, batch, head, group,
            pair, left, right, limit, scale, factor, HEADS, GROUPS, pairs // HEADS, DROPS,
        )  # fmt: skip
        sums = tl.dot(dscores.to(block_k.dtype), block_k, sums, input_precision="ieee")
    _write_rows(dq, dq_strides, batch, head, row, queries, column, dim, sums * slope)


@triton.jit(do_not_specialize=SIZES)
def _keys_kernel(
    q, k, v, dout, lse, delta, dk, dv, seeds, places, q_strides, k_strides, v_strides, dout_strides, dk_strides,
    dv_strides, queries, keys, pairs, left, right, limit, scale, factor, slope, dim, value_dim,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of a block of keys of one KV head: the sum over its query heads."""
    batches = pairs // HEADS
    program = tl.program_id(0)
    batch, group = program % (batches * GROUPS) // GROUPS, program % GROUPS
    first = program // (batches * GROUPS) * ROWS
    key = first + tl.arange(0, ROWS)
    column, value_column = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    own_k = _rows_of(k, k_strides, batch, group, key, keys, column, dim)
    own_v = _rows_of(v, v_strides, batch, group, key, keys, value_column, value_dim)
    dk_sums = tl.zeros((ROWS, DIM), tl.float32)
    dv_sums = tl.zeros((ROWS, VALUE_DIM), tl.float32)
    # the blocks of queries that see any of these keys
    low = tl.maximum(first - right - (keys - queries), 0) // ROWS * ROWS
    high = tl.minimum(first + ROWS + left - (keys - queries), queries)
    for member in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + member
        for start in range(low, high, ROWS):
            row = start + tl.arange(0, ROWS)
            block_q = _rows_of(q, q_strides, batch, head, row, queries, column, dim)
            block_dout = _rows_of(dout, dout_strides, batch, head, row, queries, value_column, value_dim)
            weights, dscores = _slopes(
                block_q, own_k, own_v, block_dout, lse, delta, seeds, places, row, key, queries, keys, batch, head,
                group, batch * HEADS + head, left, right, limit, scale, factor, HEADS, GROUPS, batches, DROPS,
            )  # fmt: skip
            dv_sums = tl.dot(tl.trans(weights.to(block_dout.dtype)), block_dout, dv_sums, input_precision="ieee")
            dk_sums = tl.dot(tl.trans(dscores.to(block_q.dtype)), block_q, dk_sums, input_precision="ieee")
    _write_rows(dk, dk_strides, batch, group, key, keys, column, dim, dk_sums * slope)
    _write_rows(dv, dv_strides, batch, group, key, keys, value_column, value_dim, dv_sums)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: Window, drawn: tuple[Tensor, Tensor] | None, rate: float
) -> tuple[Tensor, Tensor]:
    """Return out [s b h dv] and lse [s b h] of q [s b h d], k and v [t b g d].

    drawn: the seed of each row [s b h] and the place of each key [t b g] in int64, or None where no weight is dropped
    """
    queries, batch, heads, _ = q.shape
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    tile = _Tile(q, k, v, window, drawn, rate)
    with torch.cuda.device_of(q):
        _forward_kernel[(tile.programs(queries) * batch * heads,)](
            q, k, v, out, lse, *tile.numbers, *map(_strides, (q, k, v, out)), *tile.sizes, scale * LOG2_E, tile.factor,
            *tile.dims, *tile.constants, num_warps=tile.blocks.warps, num_stages=1,
        )  # fmt: skip
    return out, lse.permute(2, 0, 1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    scale: float, window: Window, drawn: tuple[Tensor, Tensor] | None, rate: float,
) -> None:  # fmt: skip
    """Write dq, dk and dv, of which columns behind those of q, k and v are left as they are.

    delta and lse are contiguous `b h s` in float32, lse with inf in rows without keys.
    """
    queries, batch, heads, _ = q.shape
    tile, lse = _Tile(q, k, v, window, drawn, rate), lse * LOG2_E
    given, how = (q, k, v, dout, lse, delta), {"num_warps": tile.blocks.warps, "num_stages": 1}
    rest = *tile.sizes, scale * LOG2_E, tile.factor, scale, *tile.dims, *tile.constants
    with torch.cuda.device_of(q):
        _queries_kernel[(tile.programs(queries) * batch * heads,)](
            *given, dq, *tile.numbers, *map(_strides, (q, k, v, dout, dq)), *rest, **how
        )
        _keys_kernel[(tile.programs(k.shape[0]) * batch * k.shape[2],)](
            *given, dk, dv, *tile.numbers, *map(_strides, (q, k, v, dout, dk, dv)), *rest, **how
        )


class _Tile:
    """The arguments that the passes over one tile share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, drawn: tuple[Tensor, Tensor] | None, rate: float
    ) -> None:
        (queries, batch, heads, dim), (keys, _, groups, value_dim) = q.shape, v.shape
        left, right = (FAR if limit is None else min(limit, FAR) for limit in window)
        padded = [max(16, triton.next_power_of_2(x)) for x in (dim, value_dim)]
        self.blocks = blocks(max(padded), q.element_size())
        # a pointer that is not read
        self.numbers = drawn or (q, k)
        self.factor = 1 / (1 - rate)
        self.sizes = queries, keys, batch * heads, left, right, threshold(rate)
        self.dims = dim, value_dim
        self.constants = heads, groups, drawn is not None, self.blocks.rows, *padded

    def programs(self, tokens: int) -> int:
        return triton.cdiv(tokens, self.blocks.rows)


def _strides(x: Tensor) -> tuple[Any, ...]:
    """Return the strides of tokens, batch and heads; a dim of size 1 may have any."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
