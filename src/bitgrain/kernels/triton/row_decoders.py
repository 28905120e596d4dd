"""Decoders of weights that are read row by row as they are stored: codes with scales, and unquantized rows.

Each is a function as weight_product describes them, its values the numbers of the weight's dequantize() to the bit.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_dense(parts, sizes, row, start, k, SETTINGS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The stored numbers.

    parts: data [N, K] of any float type.
    """
    at = start + tl.arange(0, BLOCK_K)
    return tl.load(parts[0] + row[:, None] * k + at[None, :], mask=(at < k)[None, :], other=0).to(tl.float32), None, None


@triton.jit
def decode_coded(parts, sizes, row, start, k, SETTINGS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(table[code] - zero) * (scale * second).

    parts: codes, a dense stream uint8 [N, bytes]; table float32 [2**bits]; scale float [S, G], or uint8 with a table of its own;
           zero of scale's shape, int16 or float32; second float32 [1 or N, H]; group index int32 [K]; row index int32 [N]; table of
           scales float32 [256].  What SETTINGS say is absent may be any tensor.
    sizes: bytes of a row, G, columns per scale, rows per scale, H, columns per second, rows per second.
    SETTINGS: bits; whether there are zero points, seconds, a group index, a row index, a table of scales.
    """
    BITS: tl.constexpr = SETTINGS[0]
    at = start + tl.arange(0, BLOCK_K)
    here = (at < k)[None, :]
    bit = at * BITS
    code_at = row[:, None] * sizes[0] + (bit // 8)[None, :]
    code = tl.load(parts[0] + code_at, mask=here, other=0).to(tl.int32)
    if 8 % BITS != 0:
        more = here & ((bit // 8 + 1) < sizes[0])[None, :]
        code = code | (tl.load(parts[0] + code_at + 1, mask=more, other=0).to(tl.int32) << 8)
    value = tl.load(parts[1] + ((code >> (bit % 8)[None, :]) & ((1 << BITS) - 1)))
    scale_row = row // sizes[3]
    if SETTINGS[4]:
        scale_row = tl.load(parts[6] + row).to(tl.int64)
    group = at // sizes[2]
    if SETTINGS[3]:
        group = tl.load(parts[5] + at, mask=at < k, other=0)
    scale_at = scale_row[:, None] * sizes[1] + group[None, :]
    scale = tl.load(parts[2] + scale_at, mask=here, other=0)
    if SETTINGS[5]:
        scale = tl.load(parts[7] + scale.to(tl.int32))
    else:
        scale = scale.to(tl.float32)
    if SETTINGS[1]:
        value -= tl.load(parts[3] + scale_at, mask=here, other=0).to(tl.float32)
    if SETTINGS[2]:
        scale *= tl.load(parts[4] + (row // sizes[6])[:, None] * sizes[4] + (at // sizes[5])[None, :], mask=here, other=0)
    return value * scale, None, None
