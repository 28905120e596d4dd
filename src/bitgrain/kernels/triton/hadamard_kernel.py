"""Walsh-Hadamard transforms of blocks of rows in Triton, in float32.

This module imports triton, and is imported only when a transform runs.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from bitgrain.kernels.triton.ahead import CompileExample
from bitgrain.kernels.triton.rounding import narrowed


@triton.jit
def butterflies(values, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):
    """values [ROWS, WIDTH] times the Sylvester matrix, WIDTH = 2^STAGES: the definition's sums in the definition's order."""
    for stage in tl.static_range(STAGES):
        pairs = tl.permute(tl.reshape(values, (ROWS, WIDTH // (2 << stage), 2, 1 << stage)), (0, 1, 3, 2))
        first, second = tl.split(pairs)
        values = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2)), (ROWS, WIDTH))
    return values


@triton.jit
def transform_blocks(x, base, out, factor, ORDER: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr):
    """out[b, i * WIDTH + j] = factor * sum over r of base[i, r] * (x[b, r] S)[j]; one block b of ORDER * WIDTH entries per program.

    Args:
        base:   float32 [ORDER, ORDER] of +-1, ORDER > 1.
        PADDED: ORDER, rounded up to a power of two.
    """
    at = tl.program_id(0).to(tl.int64) * (ORDER * WIDTH)
    row, column = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    here = (row < ORDER)[:, None] & (column < WIDTH)[None, :]
    values = tl.load(x + at + row[:, None] * WIDTH + column[None, :], mask=here, other=0).to(tl.float32)
    values = butterflies(values, PADDED, WIDTH, STAGES)
    if ORDER > 1:
        other = tl.arange(0, PADDED)
        matrix = tl.load(base + row[:, None] * ORDER + other[None, :], mask=(row < ORDER)[:, None] & (other < ORDER)[None, :], other=0)
        if PADDED < 16 or WIDTH < 16:
            values = tl.sum(matrix[:, :, None] * values[None, :, :], axis=1)
        else:
            values = tl.dot(matrix, values, input_precision="ieee")
    tl.store(out + at + row[:, None] * WIDTH + column[None, :], narrowed(values * factor, out.dtype.element_ty, WIDE), mask=here)


@triton.jit
def transform_rows(x, out, rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):
    """float32 out [rows, WIDTH] = x S; ROWS of them per program."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    values = tl.load(x + at, mask=(row < rows)[:, None], other=0).to(tl.float32)
    tl.store(out + at, butterflies(values, ROWS, WIDTH, STAGES), mask=(row < rows)[:, None])


@triton.jit
def combine_rows(x, base, out, factor, order, width, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """out[b, i, j] = factor * sum over r of base[i, r] * x[b, r, j] for float32 x [B, order, width]: ROWS times BLOCK entries per program.

    DEPTH: entries that are added up at once.
    """
    at = tl.program_id(0).to(tl.int64) * order * width
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, order, DEPTH):
        other = start + tl.arange(0, DEPTH)
        values = tl.load(x + at + other[:, None] * width + column[None, :], mask=(other < order)[:, None] & (column < width)[None, :], other=0)
        signs = tl.load(base + row[:, None] * order + other[None, :], mask=(row < order)[:, None] & (other < order)[None, :], other=0)
        total = tl.dot(signs, values, total, input_precision="ieee")
    here = (row < order)[:, None] & (column < width)[None, :]
    tl.store(out + at + row[:, None] * width + column[None, :], narrowed(total * factor, out.dtype.element_ty, WIDE), mask=here)


COMPILE_EXAMPLES = [
    CompileExample(transform_blocks, {"x": "*bf16", "base": "*bf16", "out": "*bf16", "factor": "fp32"}, {"ORDER": 1, "PADDED": 1, "WIDTH": 4096, "STAGES": 12, "WIDE": False}, "power of two", warps=8),
    CompileExample(transform_blocks, {"x": "*fp16", "base": "*fp32", "out": "*fp16", "factor": "fp32"}, {"ORDER": 28, "PADDED": 32, "WIDTH": 64, "STAGES": 6, "WIDE": False}, "base"),
    CompileExample(transform_blocks, {"x": "*fp32", "base": "*fp32", "out": "*fp32", "factor": "fp32"}, {"ORDER": 12, "PADDED": 16, "WIDTH": 4, "STAGES": 2, "WIDE": False}, "small"),
    CompileExample(transform_rows, {"x": "*bf16", "out": "*fp32", "rows": "i32"}, {"ROWS": 8, "WIDTH": 128, "STAGES": 7}),
    CompileExample(
        combine_rows, {"x": "*fp32", "base": "*fp32", "out": "*bf16", "factor": "fp32", "order": "i32", "width": "i32"}, {"WIDE": False, "ROWS": 64, "BLOCK": 64, "DEPTH": 32}
    ),
]  # fmt: skip
