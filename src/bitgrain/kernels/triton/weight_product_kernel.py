"""Products with weights that are decoded while they are multiplied: one kernel, and a decoder for each kind of weight.

A decoder is a function of (parts, sizes, row [BLOCK_N], start, k, SETTINGS, BLOCK_K) that returns

    value    float32 [BLOCK_N, BLOCK_K], the columns from `start` on of the rows `row`; 0 beyond k
    scale    float32 [BLOCK_N], or None: what the values are multiplied with
    minimum  float32 [BLOCK_N], or None: what is added to them then

`parts` and `sizes` are tuples of tensors and integers, SETTINGS is a tuple of constants; what they are is said at each decoder.
This module imports triton.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from bitgrain.kernels.triton.ahead import CompileExample
from bitgrain.kernels.triton.block_decoders import decode_planes, decode_points, decode_ternary
from bitgrain.kernels.triton.code_decoders import decode_additive, decode_lattice, decode_lookup, decode_trellis, decode_vector
from bitgrain.kernels.triton.rounding import narrowed
from bitgrain.kernels.triton.row_decoders import decode_coded, decode_dense


@triton.jit
def _dot(w, x, total, WIDE: tl.constexpr):
    """total + w x; in float32 where the interpreter would multiply the bits of brain floats."""
    if WIDE:
        return total + tl.dot(w.to(tl.float32), x.to(tl.float32), input_precision="ieee")
    return tl.dot(w, x, total, input_precision="ieee")


@triton.jit
def _product(w, x, total, EXACT: tl.constexpr, PIECES: tl.constexpr, WIDE: tl.constexpr):
    """total + w x, every product exact up to 2^-24 of it.

    w is float32.  EXACT: its values are exact in x's 16 bits.  Else it is the sum of three bfloat16 (24 bits of significand),
    and an x of float16 the sum of two; without PIECES both become float32.
    """
    if x.dtype == tl.float32:
        return _dot(w, x, total, WIDE)
    elif EXACT:
        return _dot(w.to(x.dtype), x, total, WIDE)
    elif not PIECES:
        return _dot(w, x.to(tl.float32), total, WIDE)
    else:
        first = w.to(tl.bfloat16)
        rest = w - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        if x.dtype == tl.float16:
            high = x.to(tl.bfloat16)
            low = (x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
            total = _dot(first, low, total, WIDE)
            total = _dot(second, low, total, WIDE)
        else:
            high = x
        total = _dot(third, high, total, WIDE)
        total = _dot(second, high, total, WIDE)
        return _dot(first, high, total, WIDE)


@triton.jit
def weight_product(
    x, out, bias, parts, sizes, m, n, k, per_split,
    DECODE: tl.constexpr, SETTINGS: tl.constexpr, EXACT: tl.constexpr, PIECES: tl.constexpr, BIAS: tl.constexpr, PARTIAL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, m, n] = sum over the split's columns of x[m, k] W[n, k] (+ bias[n] where there is one split).

    Args:
        x:         [M, K] row-major, float32, float16 or bfloat16.
        out:       [M, N] of the result's dtype; PARTIAL: float32 [splits, M, N].
        bias:      [N], if BIAS.
        per_split: columns of a split, a multiple of BLOCK_K.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe = tl.minimum(row, n - 1).to(tl.int64)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    token_here = token < m
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    first = tl.program_id(2) * per_split
    for start in range(first, tl.minimum(first + per_split, k), BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        across = tl.load(x + token.to(tl.int64)[None, :] * k + at[:, None], mask=token_here[None, :] & (at < k)[:, None], other=0)
        value, scale, minimum = DECODE(parts, sizes, safe, start, k, SETTINGS, BLOCK_K)
        if scale is None:
            total = _product(value, across, total, EXACT, PIECES, WIDE)
        else:
            none = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            total += _product(value, across, none, EXACT, PIECES, WIDE) * scale[:, None]
        if minimum is not None:
            total += minimum[:, None] * tl.sum(across.to(tl.float32), axis=0)[None, :]
    both = (row < n)[:, None] & token_here[None, :]
    place = token.to(tl.int64)[None, :] * n + row[:, None]
    if PARTIAL:
        tl.store(out + tl.program_id(2).to(tl.int64) * m * n + place, total, mask=both)
    else:
        if BIAS:
            total += tl.load(bias + safe).to(tl.float32)[:, None]
        tl.store(out + place, narrowed(total, out.dtype.element_ty, WIDE), mask=both)


@triton.jit
def add_splits(partial, out, bias, count, n, SPLITS: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = partial[0, i] + partial[1, i] + ... in this order (+ bias[i mod n]), for i below count = M N."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = place < count
    total = tl.load(partial + place, mask=here, other=0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial + split * count.to(tl.int64) + place, mask=here, other=0)
    if BIAS:
        total += tl.load(bias + place % n, mask=here, other=0).to(tl.float32)
    tl.store(out + place, narrowed(total, out.dtype.element_ty, WIDE), mask=here)


@triton.jit
def decode_rows(
    index, out, parts, sizes, rows, k,
    DECODE: tl.constexpr, SETTINGS: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[r] = W[index[r]], rounded once to out's dtype.

    Args:
        index: int64 [rows], each a row of W.
        out:   [rows, K].
    """
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = place < rows
    row = tl.load(index + place, mask=here, other=0)
    start = tl.program_id(1) * BLOCK_K
    at = start + tl.arange(0, BLOCK_K)
    value, scale, minimum = DECODE(parts, sizes, row, start, k, SETTINGS, BLOCK_K)
    if scale is not None:
        value = value * scale[:, None]
    if minimum is not None:
        value = value + minimum[:, None]
    tl.store(out + place.to(tl.int64)[:, None] * k + at[None, :], narrowed(value, out.dtype.element_ty, WIDE), mask=here[:, None] & (at < k)[None, :])


# decoder, types of its parts, number of its sizes, SETTINGS, exact, BLOCK_K
_LOOKUP = (decode_lookup, ("*u8", "*u8", "*u8", "*fp32", "*bf16"), 5, (4, 0, 1), False, 64)
_LOOKUP_5 = (decode_lookup, ("*u8", "*u8", "*u8", "*fp32", "*fp32"), 5, (5, 1, 0), False, 64)
_ADDITIVE = (decode_additive, ("*i16", "*fp16", "*fp16"), 1, (1, 16, 1, 8), False, 64)
_VECTOR = (decode_vector, ("*i32", "*i32", "*i16", "*u8", "*u8", "*fp16", "*fp16", "*fp16", "*fp16", "*fp16"), 4, (8, 4, 1, 1, 1, 1), False, 64)
_LATTICE = (decode_lattice, ("*i16", "*u8", "*fp16", "*fp32"), 1, (0, 1.0), True, 64)
_LATTICE_4 = (decode_lattice, ("*i16", "*i16", "*fp16", "*fp32"), 1, (16, 3.45), False, 64)
_TRELLIS = (decode_trellis, ("*u8", "*fp16"), 1, (2, 16, 2, 2, 9, 1), False, 64)
_TRELLIS_COMPUTED = (decode_trellis, ("*u8", "*u8"), 1, (3, 16, 1, 4, 0, 0), False, 64)
_TRELLIS_HALVES = (decode_trellis, ("*u8", "*u8"), 1, (2, 16, 1, 5, 0, 0), False, 64)
_PLANES_TYPES = ("*u8", "*u8", "*u8", "*fp16", "*fp16", "*u8", "*u8", "*fp32")
_Q4_K = (decode_planes, _PLANES_TYPES, 4, (4, 0, 0, 1, 2, 8), True, 32)
_Q6_K = (decode_planes, _PLANES_TYPES, 4, (6, 0, 32, 2, 0, 16), True, 16)
_POINTS = [(decode_points, ("*u8", "*i8"), 2, (number,), True, block_k) for number, block_k in ((0, 32), (2, 16), (4, 32), (6, 16))]
_TERNARY = (decode_ternary, ("*u8",), 1, (0,), True, 32)
_CODED = (decode_coded, ("*u8", "*fp32", "*fp16", "*i16", "*fp32", "*i32", "*i32", "*fp32"), 7, (3, 1, 0, 1, 0, 0), False, 64)
_DENSE = (decode_dense, ("*bf16",), 1, (0,), False, 64)


def _product_example(kernel, decoding, x, name, splits=False, pieces=True, block_m=16, only=()):
    decode, parts, sizes, settings, exact, block_k = decoding
    types = {
        "x": f"*{x}", "out": "*fp32" if splits else f"*{x}", "bias": f"*{x}", "parts": parts, "sizes": ("i32",) * sizes, "m": "i32", "n": "i32", "k": "i32",
        "per_split": "i32",
    }  # fmt: skip
    constants = {
        "DECODE": decode, "SETTINGS": settings, "EXACT": exact, "PIECES": pieces, "BIAS": not splits, "PARTIAL": splits, "WIDE": False, "BLOCK_M": block_m,
        "BLOCK_N": 64, "BLOCK_K": block_k,
    }  # fmt: skip
    return CompileExample(kernel, types, constants, name, only=only)


def _rows_example(kernel, decoding, out, name, only=()):
    decode, parts, sizes, settings, _, block_k = decoding
    types = {"index": "*i64", "out": f"*{out}", "parts": parts, "sizes": ("i32",) * sizes, "rows": "i32", "k": "i32"}
    return CompileExample(kernel, types, {"DECODE": decode, "SETTINGS": settings, "WIDE": False, "BLOCK_N": 16, "BLOCK_K": block_k}, name, only=only)


_NVIDIA, _OTHERS = ("sm90",), ("sm80", "gfx942")
COMPILE_EXAMPLES = [
    _product_example(weight_product, _LOOKUP, "bf16", "4-bit lookup"),
    _product_example(weight_product, _LOOKUP, "fp16", "4-bit lookup, splits, many rows", True, block_m=64, only=_NVIDIA),
    _product_example(weight_product, _LOOKUP, "fp16", "without brain floats", pieces=False, only=("sm80",)),
    _product_example(weight_product, _LOOKUP_5, "fp32", "5-bit lookup", only=_OTHERS),
    _product_example(weight_product, _ADDITIVE, "bf16", "additive", only=_NVIDIA),
    _product_example(weight_product, _VECTOR, "fp16", "vectors", only=_OTHERS),
    _product_example(weight_product, _LATTICE, "bf16", "lattice", only=_OTHERS),
    _product_example(weight_product, _LATTICE_4, "fp16", "lattice with residuals", only=_NVIDIA),
    _product_example(weight_product, _TRELLIS, "bf16", "trellis with a table", only=_OTHERS),
    _product_example(weight_product, _TRELLIS_COMPUTED, "bf16", "trellis of two products", only=_NVIDIA),
    _product_example(weight_product, _TRELLIS_HALVES, "fp16", "trellis of halves", only=("gfx942",)),
    _product_example(weight_product, _CODED, "bf16", "codes as they are stored", only=_OTHERS),
    _product_example(weight_product, _DENSE, "bf16", "decoded into a workspace", True, block_m=64, only=_NVIDIA),
    _product_example(weight_product, _Q4_K, "bf16", "planes with minima", block_m=64),
    _product_example(weight_product, _Q6_K, "fp16", "planes of six bits", True, only=_OTHERS),
    *(_product_example(weight_product, points, "bf16", f"points {place}", only=_NVIDIA) for place, points in enumerate(_POINTS)),
    *(_product_example(weight_product, points, "fp16", f"points {place}", only=("gfx942",)) for place, points in enumerate(_POINTS)),
    _product_example(weight_product, _TERNARY, "bf16", "ternary", only=_OTHERS),
    CompileExample(
        add_splits, {"partial": "*fp32", "out": "*bf16", "bias": "*bf16", "count": "i32", "n": "i32"}, {"SPLITS": 4, "BIAS": True, "WIDE": False, "BLOCK": 1024}
    ),
    _rows_example(decode_rows, _CODED, "bf16", "integers"),
    _rows_example(decode_rows, _Q4_K, "bf16", "planes", ("sm80",)),
    _rows_example(decode_rows, _DENSE, "fp16", "unquantized", ("gfx942",)),
]
