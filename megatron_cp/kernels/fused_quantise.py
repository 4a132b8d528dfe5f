"""Triton kernels that quantise blocks of numbers for a message, and that add messages up; imported where they run only.

A program handles a few blocks: it reads each number once, and writes codes and scales into the message at once. The
codes and scales are those of `replicas.blocks`, which computes the same in torch, to the bit; sums are to rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096
"""Elements of a program: 32 for each thread of 4 warps."""


@triton.jit
def _codes(x, scale, STEPS: tl.constexpr):
    """Return the nearest whole number of steps, ties to even, as a float; 0 for what is no number."""
    steps = tl.div_rn(x, tl.maximum(scale, 1.1754943508222875e-38)[:, None] + tl.zeros_like(x))
    # adding 1.5 * 2^23 leaves no bits after the point
    steps = (steps + 12582912.0) - 12582912.0
    return tl.where(steps == steps, tl.minimum(tl.maximum(steps, -STEPS), STEPS), 0.0)


@triton.jit
def _left(x, codes, scale):
    """Return what the codes do not say, 0 where that is no number."""
    rest = x - codes * scale[:, None]
    return tl.where(tl.abs(rest) < float("inf"), rest, 0.0)


@triton.jit(do_not_specialize=["rows"])
def _quantise_kernel(
    values,
    left,
    codes,
    scales,
    rows,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    PACKED: tl.constexpr,
    KEEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Quantise blocks to whole numbers of a block's scale; where KEEPS, add what was left before and keep the rest."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    PART: tl.constexpr = BLOCK // 2 if PACKED else BLOCK
    column = tl.arange(0, PART)[None, :]
    at = row[:, None] * BLOCK + column
    low = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
    if KEEPS:
        low += tl.load(left + at, mask=there, other=0.0).to(tl.float32)
    top = tl.max(tl.abs(low), axis=1)
    # no maximum sees what is no number, a sum does
    strange = tl.sum(low * 0.0, axis=1)
    if PACKED:
        high = tl.load(values + at + PART, mask=there, other=0.0).to(tl.float32)
        if KEEPS:
            high += tl.load(left + at + PART, mask=there, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.abs(high), axis=1))
        strange += tl.sum(high * 0.0, axis=1)
    scale = tl.div_rn(top, tl.full((ROWS,), STEPS, tl.float32)) + strange
    found = _codes(low, scale, STEPS)
    to = codes + row[:, None] * (PART + 4) + column
    if PACKED:
        others = _codes(high, scale, STEPS)
        # four bits each, from 1 to 15
        tl.store(to, ((found + 8.0).to(tl.int32) | ((others + 8.0).to(tl.int32) << 4)).to(tl.uint8), mask=there)
        if KEEPS:
            tl.store(left + at + PART, _left(high, others, scale).to(left.dtype.element_ty), mask=there)
    else:
        # the bits of a signed byte
        tl.store(to, (found.to(tl.int32) & 255).to(tl.uint8), mask=there)
    if KEEPS:
        tl.store(left + at, _left(low, found, scale).to(left.dtype.element_ty), mask=there)
    tl.store(scales + row * (PART // 4 + 1) + PART // 4, scale, mask=row < rows)


@triton.jit(do_not_specialize=["peers", "rows"])
def _add_kernel(codes, scales, total, peers, rows, BLOCK: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr):
    """Add up the numbers that messages stand for, in the order of the peers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    PART: tl.constexpr = BLOCK // 2 if PACKED else BLOCK
    column = tl.arange(0, PART)[None, :]
    low = tl.zeros((ROWS, PART), tl.float32)
    high = tl.zeros((ROWS, PART), tl.float32)
    for peer in range(peers):
        place = row + peer * rows.to(tl.int64)
        scale = tl.load(scales + place * (PART // 4 + 1) + PART // 4, mask=row < rows, other=0.0)[:, None]
        found = tl.load(codes + place[:, None] * (PART + 4) + column, mask=there, other=0).to(tl.int32)
        if PACKED:
            low += ((found & 15) - 8).to(tl.float32) * scale
            high += ((found >> 4) - 8).to(tl.float32) * scale
        else:
            low += tl.where(found > 127, found - 256, found).to(tl.float32) * scale
    at = row[:, None] * BLOCK + column
    tl.store(total + at, low, mask=there)
    if PACKED:
        tl.store(total + at + PART, high, mask=there)


def quantise(values: Tensor, bits: int, left: Tensor | None, messages: Tensor) -> None:
    """Write the messages [rows width] for blocks of values [rows block]; see `blocks.quantised`."""
    rows, block = values.shape
    with torch.cuda.device_of(values):
        _quantise_kernel[_grid(rows, block)](
            values,
            values if left is None else left,
            messages,
            messages.view(torch.float32),
            rows,
            BLOCK=block,
            STEPS=float(2 ** (bits - 1) - 1),
            PACKED=bits == 4,
            KEEPS=left is not None,
            ROWS=_rows(rows, block),
        )


def add(messages: Tensor, bits: int, total: Tensor) -> None:
    """Write to total [rows block] the sum of what messages [peers rows width] stand for, in float32."""
    rows, block = total.shape
    with torch.cuda.device_of(total):
        _add_kernel[_grid(rows, block)](
            messages,
            messages.view(torch.float32),
            total,
            len(messages),
            rows,
            BLOCK=block,
            PACKED=bits == 4,
            ROWS=_rows(rows, block),
        )


def _rows(rows: int, block: int) -> int:
    """Return the blocks of a program."""
    return min(max(1, ELEMENTS // block), triton.next_power_of_2(rows))


def _grid(rows: int, block: int) -> tuple[int]:
    return (triton.cdiv(rows, _rows(rows, block)),)
