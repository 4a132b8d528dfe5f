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

from megatron_cp.kernels.stream_k_plan import BLOCK, cut


@triton.jit
def _accumulate(
    a, b, m, n, k, a_row, a_column, b_row, b_column, tile, first, last, columns,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Return the sum over steps first .. last of one tile, in float32."""
    row = (tile // columns) * M + tl.arange(0, M)
    column = (tile % columns) * N + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for step in range(first, last):
        inner = step * K + tl.arange(0, K)
        left = tl.load(
            a + row[:, None].to(tl.int64) * a_row + inner[None, :] * a_column,
            mask=(row < m)[:, None] & (inner < k)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + inner[:, None].to(tl.int64) * b_row + column[None, :] * b_column,
            mask=(inner < k)[:, None] & (column < n)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _product_kernel(
    a, b, out, parts, m, n, k, a_row, a_column, b_row, b_column, columns, inner, whole, tiles, share,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PROGRAMS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Compute this program's whole tiles, then its share of the steps of the others."""
    program = tl.program_id(0)
    # 1. whole tiles, one after the other
    for tile in range(program, whole, PROGRAMS):
        total = _accumulate(
            a, b, m, n, k, a_row, a_column, b_row, b_column, tile, 0, inner, columns, M, N, K
        )  # fmt: skip
        row = (tile // columns) * M + tl.arange(0, M)
        column = (tile % columns) * N + tl.arange(0, N)
        place = row[:, None].to(tl.int64) * n + column[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < m)[:, None] & (column < n)[None, :])
    # 2. an even share of the rest: the end of a tile, whole ones, the beginning of another; each into its own part
    step = program * share
    end = tl.minimum(step + share, (tiles - whole) * inner)
    for part in range(MOST):
        if step < end:
            tile = step // inner
            first = step - tile * inner
            last = tl.minimum(inner, first + end - step)
            total = _accumulate(
                a, b, m, n, k, a_row, a_column, b_row, b_column, whole + tile, first, last, columns, M, N, K
            )  # fmt: skip
            place = (program * MOST + part).to(tl.int64) * (M * N)
            tl.store(parts + place + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], total)
            step += last - first


@triton.jit
def _fix_up_kernel(
    parts, out, m, n, columns, inner, whole, share,
    M: tl.constexpr, N: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Add the parts of one shared tile, in order of their steps."""
    shared = tl.program_id(0)
    tile = whole + shared
    start, end = shared * inner, (shared + 1) * inner
    total = tl.zeros((M, N), tl.float32)
    for program in range(start // share, tl.cdiv(end, share)):
        # the first tile that the program has steps of is its part 0
        part = shared - program * share // inner
        place = (program * MOST + part).to(tl.int64) * (M * N)
        total += tl.load(parts + place + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    row = (tile // columns) * M + tl.arange(0, M)
    column = (tile % columns) * N + tl.arange(0, N)
    place = row[:, None].to(tl.int64) * n + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < m)[:, None] & (column < n)[None, :])


def matmul(a: Tensor, b: Tensor, programs: int, block: tuple[int, int, int] = BLOCK) -> Tensor:
    """Return a [m, k] times b [k, n], of any strides, on `programs` programs: one for each of the GPU's processors.

    Sums are float32 and are rounded once, to the dtype of a.
    """
    (m, k), n = a.shape, b.shape[1]
    plan = cut(m, n, k, block, programs)
    most = plan.most_parts
    out = a.new_empty(m, n)
    parts = torch.empty(max(1, programs * most), *block[:2], dtype=torch.float32, device=a.device)
    _product_kernel[(programs,)](
        a, b, out, parts, m, n, k, *a.stride(), *b.stride(), plan.columns, plan.inner, plan.whole, plan.tiles,
        plan.share, *block, programs, most,
    )  # fmt: skip
    if plan.shared:
        _fix_up_kernel[(plan.shared,)](
            parts, out, m, n, plan.columns, plan.inner, plan.whole, plan.share, *block[:2], most
        )  # fmt: skip
    return out
