"""Stream-K (Osama et al. 2023, PPoPP): a matrix product whose work is cut evenly, in the middle of tiles if need be.

Tiles of the output are cut into steps along the inner dimension. Whole waves of tiles are computed one tile per
program; the steps of the remaining tiles are dealt out evenly, so that no program idles in a last, partly filled wave.
A program whose steps are a part of a tile writes its partial sum to a workspace, and a second kernel adds the parts of
each such tile: no program waits for another one. Imported where it runs only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_cp.kernels.stream_k_plan import StreamTiling, cut, tiling_of

PLAN = ["rows", "columns", "inner", "whole", "tiles", "share", "most"]
"""Arguments that differ between products, for which a kernel is not compiled anew."""


@triton.jit
def _corner(tile, rows, columns, GROUP: tl.constexpr):
    """Return the row and the column of a tile: in groups of rows, whose tiles share what they read in the L2 cache."""
    first = tile // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = tile % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def _accumulate(
    a, b, m, n, k, a_row, a_column, b_row, b_column, row_tile, column_tile, first, last,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return the sum over steps first .. last of one tile, in float32."""
    row = row_tile * M + tl.arange(0, M)
    column = column_tile * N + tl.arange(0, N)
    inner = first * K + tl.arange(0, K)
    in_a, in_b = (row < m)[:, None], (column < n)[None, :]
    left_at = a + row[:, None].to(tl.int64) * a_row + inner[None, :].to(tl.int64) * a_column
    right_at = b + inner[:, None].to(tl.int64) * b_row + column[None, :].to(tl.int64) * b_column
    total = tl.full((M, N), 0.0, tl.float32)
    for step in range(first, last):
        if EVEN:
            left = tl.load(left_at, mask=in_a, other=0.0)
            right = tl.load(right_at, mask=in_b, other=0.0)
        else:
            there = step * K + tl.arange(0, K) < k
            left = tl.load(left_at, mask=in_a & there[None, :], other=0.0)
            right = tl.load(right_at, mask=in_b & there[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        left_at += K * a_column
        right_at += K * b_row
    return total


@triton.jit
def _write(out, m, n, row_tile, column_tile, total, M: tl.constexpr, N: tl.constexpr):
    """Round one tile to the dtype of the output, which is contiguous."""
    row = row_tile * M + tl.arange(0, M)
    column = column_tile * N + tl.arange(0, N)
    place = row[:, None].to(tl.int64) * n + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < m)[:, None] & (column < n)[None, :])


@triton.jit(do_not_specialize=PLAN)
def _product_kernel(
    a, b, out, parts, m, n, k, a_row, a_column, b_row, b_column, rows, columns, inner, whole, tiles, share, most,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute this program's whole tiles, then its share of the steps of the others."""
    program = tl.program_id(0)
    # 1. whole tiles, one after the other
    for tile in range(program, whole, PROGRAMS):
        row_tile, column_tile = _corner(tile, rows, columns, GROUP)
        total = _accumulate(
            a, b, m, n, k, a_row, a_column, b_row, b_column, row_tile, column_tile, 0, inner, M, N, K, EVEN
        )  # fmt: skip
        _write(out, m, n, row_tile, column_tile, total, M, N)
    # 2. an even share of the rest: the end of a tile, whole ones, the beginning of another; each into its own part
    start = program * share
    end = tl.minimum(start + share, (tiles - whole) * inner)
    for tile in range(start // inner, (end + inner - 1) // inner):
        row_tile, column_tile = _corner(whole + tile, rows, columns, GROUP)
        first = tl.maximum(start - tile * inner, 0)
        last = tl.minimum(end - tile * inner, inner)
        total = _accumulate(
            a, b, m, n, k, a_row, a_column, b_row, b_column, row_tile, column_tile, first, last, M, N, K, EVEN
        )  # fmt: skip
        place = (program * most + tile - start // inner).to(tl.int64) * (M * N)
        tl.store(parts + place + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], total)


@triton.jit(do_not_specialize=PLAN)
def _fix_up_kernel(
    parts, out, m, n, rows, columns, inner, whole, share, most,
    M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Add the parts of some rows of one shared tile, in order of their steps."""
    shared, slice_of = tl.program_id(0), tl.program_id(1)
    start, end = shared * inner, (shared + 1) * inner
    within = slice_of * SLICE + tl.arange(0, SLICE)
    total = tl.full((SLICE, N), 0.0, tl.float32)
    for program in range(start // share, (end + share - 1) // share):
        # the first tile that the program has steps of is its part 0
        part = shared - program * share // inner
        place = (program * most + part).to(tl.int64) * (M * N)
        total += tl.load(parts + place + within[:, None] * N + tl.arange(0, N)[None, :])
    row_tile, column_tile = _corner(whole + shared, rows, columns, GROUP)
    row = row_tile * M + within
    column = column_tile * N + tl.arange(0, N)
    place = row[:, None].to(tl.int64) * n + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < m)[:, None] & (column < n)[None, :])


def matmul(
    a: Tensor, b: Tensor, programs: int, tiling: StreamTiling | None = None, out: Tensor | None = None
) -> Tensor:
    """Return a [m, k] times b [k, n], of any strides, on `programs` programs: one for each of the GPU's processors.

    Sums are float32 and are rounded once, to the dtype of a. `out` is contiguous [m, n] and is written to.
    """
    (m, k), n = a.shape, b.shape[1]
    tiling = tiling or tiling_of(a.element_size())
    plan = cut(m, n, k, tiling.block, programs)
    result = a.new_empty(m, n) if out is None else out
    rows, columns, inner = tiling.block
    parts = torch.empty(max(1, programs * plan.most_parts), rows, columns, dtype=torch.float32, device=a.device)
    how = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    _product_kernel[(programs,)](
        a, b, result, parts, m, n, k, *a.stride(), *b.stride(), plan.rows, plan.columns, plan.inner, plan.whole,
        plan.tiles, plan.share, plan.most_parts, rows, columns, inner, programs, tiling.group, k % inner == 0, **how,
    )  # fmt: skip
    if plan.shared:
        part = min(rows, 16)
        _fix_up_kernel[(plan.shared, rows // part)](
            parts, result, m, n, plan.rows, plan.columns, plan.inner, plan.whole, plan.share, plan.most_parts,
            rows, columns, tiling.group, part,
        )  # fmt: skip
    return result
