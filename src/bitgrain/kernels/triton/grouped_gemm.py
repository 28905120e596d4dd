"""Grouped matrix product in Triton: rows sorted by expert, each tile of rows times its expert's packed matrix.

One source for every device that Triton compiles for.  This module imports triton, and is imported only when a product runs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# How the bytes of a weight are decoded; every decoded value is exact in 16-bit floats.
NIBBLE, BYTE, E4M3, E5M2, E2M1 = 0, 1, 2, 3, 4

@triton.jit
def _decode(codes, KIND: tl.constexpr, MIDDLE: tl.constexpr):
    """float32 of uint8 codes: code - MIDDLE of integers, the value of floats."""
    if KIND <= 1:
        return codes.to(tl.int32).to(tl.float32) - MIDDLE
    wide = codes.to(tl.int32)
    if KIND == 4:
        exponent, mantissa = (wide >> 1) & 3, wide & 1
        value = tl.where(exponent == 0, mantissa * 2, (2 + mantissa) << exponent).to(tl.float32) * 0.25
        return tl.where((wide & 8) != 0, -value, value)
    # the bits of a float32, its bias 127 in place of the type's own; subnormals are multiples of the smallest one
    if KIND == 2:
        exponent, mantissa = (wide >> 3) & 15, wide & 7
        normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
        value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    else:
        exponent, mantissa = (wide >> 2) & 31, wide & 3
        normal = (((exponent + 112) << 23) | (mantissa << 21)).to(tl.float32, bitcast=True)
        value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.0000152587890625, normal)
    return tl.where((wide & 128) != 0, -value, value)


@triton.jit
def _scale_of(pointer, offsets, mask, POWERS: tl.constexpr):
    """float32 scales; of bytes, the powers of two that they are the exponents of."""
    stored = tl.load(pointer + offsets, mask=mask, other=0)
    if POWERS:
        wide = stored.to(tl.int32)
        bits = tl.where(wide == 0, 0x400000, wide << 23)  # 2^-127 is a subnormal
        return bits.to(tl.float32, bitcast=True)
    return stored.to(tl.float32)


@triton.jit
def grouped_gemm(
    a, a_scale, out, table, rows, tile_expert,
    n, k, piece, w_group, w_rows, w_groups, a_group, a_groups, row_div, experts,
    SCALE: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr, POWERS: tl.constexpr, SCALED_INPUT: tl.constexpr,
    INTEGER: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[r, n] = sum over pieces of a_scale * w_scale * dot(a, decoded) (+ bias), for the rows r of one tile.

    Args:
        a:           [A, K], float or int8; row r reads a[r // row_div].
        a_scale:     float32 [A, a_groups], if SCALED_INPUT.
        table:       int64 [experts, 4], addresses of codes, scales, zero points and bias; 0: none.
        rows:        int64 [tiles * BLOCK_M], row numbers in out; -1: none.
        tile_expert: int32 [tiles]; `experts` or more: no rows.
        piece:       columns that share all scales; the scales of a column k are those of k // w_group and k // a_group.
        w_rows:      rows that share a scale of the weight.
        ZERO:        0: none beyond MIDDLE, 1: one int16 per scale, 2: one float32 per scale.
        INTEGER:     both sides are 8-bit integers and are multiplied as such.
        WIDE:        multiply in float32: the interpreter's 16-bit brain floats are only storage.
    """
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert >= experts:
        return
    codes_at = tl.load(table + expert * 4).to(tl.pointer_type(tl.uint8))
    scale_at = tl.load(table + expert * 4 + 1).to(tl.pointer_type(SCALE))
    row = tl.load(rows + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))
    row_here = row >= 0
    source = tl.where(row_here, row // row_div, 0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_here = column < n
    safe = tl.where(column_here, column, 0).to(tl.int64)
    scale_row = (safe // w_rows) * w_groups
    stride = (k + 1) // 2 if KIND == 0 or KIND == 4 else k
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, piece):
        part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
        sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for inner in range(0, piece, BLOCK_K):
            place = inner + tl.arange(0, BLOCK_K)
            at = start + place
            here = (place < piece) & (at < k)
            x = tl.load(a + source[:, None] * k + at[None, :], mask=row_here[:, None] & here[None, :], other=0)
            both = here[:, None] & column_here[None, :]
            if KIND == 0 or KIND == 4:
                packed = tl.load(codes_at + safe[None, :] * stride + at[:, None] // 2, mask=both, other=0)
                stored = (packed.to(tl.int32) >> ((at[:, None] % 2) * 4)) & 15
            else:
                stored = tl.load(codes_at + safe[None, :] * stride + at[:, None], mask=both, other=0).to(tl.int32)
            if INTEGER:
                w = tl.where(both, stored - MIDDLE, 0).to(tl.int8)
                part += tl.dot(x, w, out_dtype=tl.int32)
            else:
                value = _decode(stored, KIND, MIDDLE)
                if ZERO == 1:
                    zero_at = tl.load(table + expert * 4 + 2).to(tl.pointer_type(tl.int16))
                    value -= tl.load(zero_at + scale_row + start // w_group, mask=column_here, other=0).to(tl.float32)[None, :]
                value = tl.where(both, value, 0.0)
                if ZERO == 2:
                    sums += tl.sum(x.to(tl.float32), axis=1)
                if WIDE:
                    part += tl.dot(x.to(tl.float32), value, input_precision="ieee")
                else:
                    part += tl.dot(x, value.to(x.dtype), input_precision="ieee")
        scale = _scale_of(scale_at, scale_row + start // w_group, column_here, POWERS)
        term = part.to(tl.float32)
        if ZERO == 2:
            zero_at = tl.load(table + expert * 4 + 2).to(tl.pointer_type(tl.float32))
            term -= sums[:, None] * tl.load(zero_at + scale_row + start // w_group, mask=column_here, other=0)[None, :]
        term *= scale[None, :]
        if SCALED_INPUT:
            term *= tl.load(a_scale + source * a_groups + start // a_group, mask=row_here, other=0)[:, None]
        total += term
    if BIAS:
        bias_at = tl.load(table + expert * 4 + 3).to(tl.pointer_type(out.dtype.element_ty))
        total += tl.load(bias_at + safe, mask=column_here, other=0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * n + column[None, :], total.to(out.dtype.element_ty), mask=row_here[:, None] & column_here[None, :])


SCALE_TYPES = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16, "uint8": tl.uint8}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on host tensors."""
    return bool(triton.knobs.runtime.interpret)


def launch(
    x: Tensor, x_scale: Tensor | None, out: Tensor, table: Tensor, rows: Tensor, tile_expert: Tensor, sizes: dict[str, int], flags: dict[str, int | bool | str], block_m: int
) -> None:
    """Run grouped_gemm over all tiles of `rows` and all columns of `out`.

    Args:
        sizes: n, k, piece, w_group, w_rows, w_groups, a_group, a_groups, row_div, experts.
        flags: SCALE (a key of SCALE_TYPES), ZERO, BIAS, KIND, MIDDLE, INTEGER.
    """
    scale = str(flags["SCALE"])
    smallest = 32 if flags["INTEGER"] else 16
    block_k = min(64, max(smallest, triton.next_power_of_2(sizes["piece"])))
    block_n = min(64, max(16, triton.next_power_of_2(sizes["n"])))
    grid = (tile_expert.shape[0], triton.cdiv(sizes["n"], block_n))
    grouped_gemm[grid](
        x, x if x_scale is None else x_scale, out, table, rows, tile_expert, **sizes, SCALE=SCALE_TYPES[scale],
        ZERO=flags["ZERO"], BIAS=flags["BIAS"], KIND=flags["KIND"], MIDDLE=flags["MIDDLE"], POWERS=scale == "uint8", SCALED_INPUT=x_scale is not None,
        INTEGER=flags["INTEGER"], WIDE=interpreted(), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
