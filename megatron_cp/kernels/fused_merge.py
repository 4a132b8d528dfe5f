"""Triton kernels that merge several partial results in one pass over memory; imported where they run only.

A program handles a few rows of one head: it reads each part that covers them once and writes the result once. Inputs
are partial results in any float dtype and with any strides but a contiguous last dim; sums are float32 and are rounded
to the dtype of the output, which may be one of the inputs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096
"""Elements of a program: 32 for each thread of 4 warps."""


class Part(NamedTuple):
    """A part `x` of a result from its row `first` on; `lse` has the row statistics of attention."""

    first: int
    x: Tensor
    lse: Tensor | None = None


@triton.jit(do_not_specialize=["rows", "heads", "pairs", "lse_row", "lse_batch", "lse_head"])
def _merge_kernel(
    parts,
    out,
    lse,
    rows,
    heads,
    columns,
    pairs,
    out_row,
    out_batch,
    out_head,
    lse_row,
    lse_batch,
    lse_head,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merge by online softmax: out = sum of exp(lse_i - lse) out_i, lse = logsumexp of lse_i."""
    program = tl.program_id(0)
    batch, head = (program % pairs) // heads, (program % pairs) % heads
    row = (program // pairs).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    # 1. the largest lse of each row; no lse is -inf in a row that any part has seen a key for
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for i in tl.static_range(len(parts)):
        _, _, _, _, part_lse, strides, span = parts[i]
        first, last = span[0] // 16, span[1] // 16
        there = (row >= first) & (row < last)
        at = (row - first) * (strides[0] // 16) + batch * (strides[1] // 16) + head * (strides[2] // 16)
        top = tl.maximum(top, tl.load(part_lse + at, mask=there, other=float("-inf")))
    shift = tl.where(top == float("-inf"), 0.0, top)
    # 2. the sums of the weights and of the weighted rows
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(len(parts)):
        x, x_row, x_batch, x_head, part_lse, strides, span = parts[i]
        first, last = span[0] // 16, span[1] // 16
        there = (row >= first) & (row < last)
        at = (row - first) * (strides[0] // 16) + batch * (strides[1] // 16) + head * (strides[2] // 16)
        log_sum = tl.load(part_lse + at, mask=there, other=float("-inf"))
        weight = tl.exp(log_sum - shift)
        total += weight
        start = (row - first) * x_row + batch.to(tl.int64) * x_batch + head * x_head
        # a row without keys adds nothing, whatever lies there
        seen = (log_sum != float("-inf"))[:, None] & inside[None, :]
        sums += weight[:, None] * tl.load(x + start[:, None] + column[None, :], mask=seen, other=0.0).to(tl.float32)
    # 3. a row that no part has seen a key for gets out 0 and lse -inf
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    end = row < rows
    start = row * out_row + batch.to(tl.int64) * out_batch + head * out_head
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + start[:, None] + column[None, :], result, mask=end[:, None] & inside[None, :])
    at = row * lse_row + batch * lse_batch + head * lse_head
    tl.store(lse + at, tl.where(some, shift + tl.log(total), float("-inf")), mask=end)


@triton.jit(do_not_specialize=["rows", "heads", "pairs"])
def _add_kernel(
    parts, out, rows, heads, columns, pairs, out_row, out_batch, out_head, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Add the parts up in their order; rows without a part get 0."""
    program = tl.program_id(0)
    batch, head = (program % pairs) // heads, (program % pairs) % heads
    row = (program // pairs).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(len(parts)):
        x, x_row, x_batch, x_head, span = parts[i]
        first, last = span[0] // 16, span[1] // 16
        there = ((row >= first) & (row < last))[:, None] & inside[None, :]
        start = (row - first) * x_row + batch.to(tl.int64) * x_batch + head.to(tl.int64) * x_head
        sums += tl.load(x + start[:, None] + column[None, :], mask=there, other=0.0).to(tl.float32)
    start = row * out_row + batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head
    result = sums.to(out.dtype.element_ty)
    tl.store(out + start[:, None] + column[None, :], result, mask=(row < rows)[:, None] & inside[None, :])


def merge(parts: Sequence[Part], out: Tensor, lse: Tensor) -> None:
    """Write the merged attention of the parts to out [s b h d] and lse [s b h].

    Rows that no part covers, or in which no part has seen a key, get out 0 and lse -inf.
    """
    with torch.cuda.device_of(out):
        _merge_kernel[_grid(out)](*_merge_arguments(parts, out, lse))


def add(parts: Sequence[Part], out: Tensor) -> None:
    """Write the sum of the parts to out [s b h d]; rows that no part covers get 0."""
    with torch.cuda.device_of(out):
        _add_kernel[_grid(out)](*_add_arguments(parts, out))


def _merge_arguments(parts: Sequence[Part], out: Tensor, lse: Tensor) -> tuple[Any, ...]:
    given = []
    for _, x, part_lse in parts:
        assert part_lse is not None, "attention comes with its lse"
        given.append((x, *_strides(x), part_lse, tuple(map(_unspecialized, _strides(part_lse)))))
    return _spanned(parts, given), out, lse, *_sizes(out), *_strides(out), *_strides(lse), *_block(out)


def _add_arguments(parts: Sequence[Part], out: Tensor) -> tuple[Any, ...]:
    given = [(part.x, *_strides(part.x)) for part in parts]
    return _spanned(parts, given), out, *_sizes(out), *_strides(out), *_block(out)


def _grid(out: Tensor) -> tuple[int]:
    rows, batch, heads, _ = out.shape
    return (triton.cdiv(rows, _block(out)[0]) * batch * heads,)


def _sizes(out: Tensor) -> tuple[int, int, int, int]:
    rows, batch, heads, columns = out.shape
    return rows, heads, columns, batch * heads


def _block(out: Tensor) -> tuple[int, int]:
    """Return the rows and columns of a program."""
    width = triton.next_power_of_2(out.shape[3])
    return min(max(1, ELEMENTS // width), triton.next_power_of_2(out.shape[0])), width


def _spanned(parts: Sequence[Part], given: Sequence[tuple[Any, ...]]) -> tuple[tuple[Any, ...], ...]:
    """Append the rows that each part covers, and parts without rows up to the next power of two.

    A kernel is compiled for each number of parts.
    """
    spans = [(part.first, part.first + part.x.shape[0]) for part in parts]
    missing = triton.next_power_of_2(len(parts)) - len(parts)
    all_spans = [*spans, *[(0, 0)] * missing]
    all_given = [*given, *[given[0]] * missing]
    return tuple((*part, tuple(map(_unspecialized, span))) for part, span in zip(all_given, all_spans, strict=True))


def _strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of all dims but that of the columns; a dim of size 1 may have any."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def _unspecialized(value: int) -> int:
    # a kernel is compiled again for integers of a tuple that are 1 or divisible by 16, this one is neither
    return 16 * value + 8
