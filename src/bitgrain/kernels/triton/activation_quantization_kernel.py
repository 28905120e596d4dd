"""One pass over an activation that gives its codes and scales, to the bit what ActivationSpec.quantize says.

This module imports triton, and is imported only when an activation is quantized.  Launch without fused multiply-adds: a product that is
rounded before it is added is part of the definition.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from bitgrain.kernels.triton.ahead import CompileExample
from bitgrain.kernels.triton.rounding import exponent_of, narrowed, nearest_integer, power_of_two, small_float, small_float_code

TINY = tl.constexpr(1.1920928955078125e-07)  # float32's eps: what a scale of zero becomes
SMALLEST_BLOCK_SCALE = tl.constexpr(0.125)


@triton.jit
def shared_power(peak, RULE: tl.constexpr, LARGEST: tl.constexpr, TOP: tl.constexpr, ROUND_BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """int32 exponent of the power of two of a block whose largest magnitude is `peak`, see numerics.block_scales.shared_exponent.

    Args:
        LARGEST:    exponent of the largest power of two of the element.
        TOP:        largest magnitude of the element.
        ROUND_BITS: "round": fraction bits of the threshold.
        MANTISSA:   "even": fraction bits of the element.
    """
    small = peak < 1.1754943508222875e-38
    normal = tl.where(small, peak * 16777216.0, peak)
    exponent = exponent_of(normal) - tl.where(small, 24, 0)
    # the fraction from 1 up to 2
    fraction = ((normal.to(tl.int32, bitcast=True) & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    if RULE == "ceil":
        raised = fraction > TOP * 2.0**-LARGEST
    elif RULE == "round":
        raised = fraction * 0.5 + 2.0 ** -(ROUND_BITS + 2) >= 1.0
    elif RULE == "even":
        raised = nearest_integer(fraction * 2.0**MANTISSA) >= 2.0 ** (MANTISSA + 1)
    elif RULE == "top":
        raised = fraction > 1.0
    else:
        raised = fraction < 1.0  # floor: never
    power = exponent + raised.to(tl.int32) - LARGEST
    power = tl.where(peak == 0.0, -127, power)
    return tl.minimum(tl.maximum(power, -127), 127)


@triton.jit
def block_scale(wanted, second, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, LARGEST, lowest_scale, DIVIDES: tl.constexpr):
    """(the scale as its one-byte type holds it, below the second one; with the second one)."""
    below = wanted * second if DIVIDES else tl.div_rn(wanted, second)
    below = tl.minimum(tl.maximum(below, lowest_scale), LARGEST)
    rounded = small_float(below, MANTISSA, LOWEST)
    rounded = tl.where(rounded == 0.0, SMALLEST_BLOCK_SCALE, rounded)
    return rounded, (tl.div_rn(rounded, second) if DIVIDES else rounded * second)


@triton.jit
def integer_codes(values, scale, zero, LOW: tl.constexpr, RECIPROCAL: tl.constexpr):
    """float32 integers; 0 of NaN."""
    if RECIPROCAL:
        moved = values * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        moved = nearest_integer(tl.minimum(tl.maximum(moved, -1048576.0), 1048576.0)) + zero
    else:
        moved = tl.div_rn(values, scale + tl.zeros(values.shape, tl.float32)) + zero
    codes = nearest_integer(tl.minimum(tl.maximum(moved, LOW * 1.0), -LOW - 1.0))
    return tl.where(moved != moved, 0.0, codes)


@triton.jit
def float_limits(values, scale, MAX: tl.constexpr):
    """values / scale, cut at the type's largest; NaN stays NaN."""
    moved = tl.div_rn(values, scale + tl.zeros(values.shape, tl.float32))
    return tl.where(moved != moved, moved, tl.minimum(tl.maximum(moved, -MAX), MAX))


@triton.jit
def range_of(values, here, row_axis: tl.constexpr):
    """(smallest, largest, whether there is a NaN) of the last axis, 0 included."""
    seen = tl.where(here, values, 0.0)
    unordered = tl.max((seen != seen).to(tl.int32), axis=row_axis)
    seen = tl.where(seen != seen, 0.0, seen)
    return tl.minimum(tl.min(seen, axis=row_axis), 0.0), tl.maximum(tl.max(seen, axis=row_axis), 0.0), unordered


@triton.jit
def parameters(
    low, high, unordered, second, top, upper, lower, lowest_scale, largest_scale,
    SYMMETRIC: tl.constexpr, LOW: tl.constexpr, SCALE_TYPE: tl.constexpr, RULE: tl.constexpr, LARGEST: tl.constexpr, TOP: tl.constexpr, ROUND_BITS: tl.constexpr,
    MANTISSA: tl.constexpr, DIVIDES: tl.constexpr,
):  # fmt: skip
    """(scale, zero, scale below the second one, exponent of an e8m0 scale) of ranges; `second` is of their shape."""
    nothing = tl.zeros(low.shape, tl.float32)
    if not SYMMETRIC:
        scale = tl.div_rn(high - low, nothing + (-2.0 * LOW - 1.0))
        scale = tl.where(scale == 0.0, TINY, scale)
        zero = tl.minimum(tl.maximum(LOW * 1.0 - tl.div_rn(low, scale), LOW * 1.0), -LOW - 1.0)
        return tl.where(unordered > 0, float("nan"), scale), nearest_integer(zero), scale, unordered
    peak = tl.maximum(tl.minimum(tl.maximum(-low, high), upper), lower)
    below, power = peak, unordered
    if SCALE_TYPE == "e8m0":
        power = shared_power(tl.div_rn(peak, second), RULE, LARGEST, TOP, ROUND_BITS, MANTISSA)
        below = power_of_two(power)
        scale = below * second
    else:
        scale = tl.div_rn(peak, nothing + top)
        if SCALE_TYPE == "e4m3":
            below, scale = block_scale(scale, second, 3, -6, largest_scale, lowest_scale, DIVIDES)
        elif SCALE_TYPE == "e5m3":
            below, scale = block_scale(scale, second, 3, -14, largest_scale, lowest_scale, DIVIDES)
        scale = tl.where(scale == 0.0, TINY, scale)
    return tl.where(unordered > 0, float("nan"), scale), nothing, below, power


@triton.jit
def store_codes(
    codes, row, k, at, here, values, scale, zero,
    INTEGER: tl.constexpr, LOW: tl.constexpr, RECIPROCAL: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, MAX: tl.constexpr,
    STORE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the codes of a tile: STORE "value": numbers of the tensor's dtype, "byte": one code per byte, "nibble": two, the even one low."""
    if INTEGER:
        tl.store(codes + row * k + at, integer_codes(values, scale, zero, LOW, RECIPROCAL).to(codes.dtype.element_ty), mask=here)
    else:
        limited = float_limits(values, scale, MAX)
        if STORE == "value":
            tl.store(codes + row * k + at, narrowed(small_float(limited, MANTISSA, LOWEST), codes.dtype.element_ty, WIDE), mask=here)
        else:
            code = small_float_code(tl.where(limited != limited, 0.0, limited), BITS, MANTISSA, LOWEST)
            code = tl.where(here, code, 0)
            if STORE == "byte":
                tl.store(codes + row * k + at, code.to(tl.uint8), mask=here)
            else:
                low, high = tl.split(tl.reshape(code, (at.shape[0], at.shape[1] // 2, 2)))
                first, _ = tl.split(tl.reshape(at, (at.shape[0], at.shape[1] // 2, 2)))
                present, _ = tl.split(tl.reshape(here.to(tl.int32), (at.shape[0], at.shape[1] // 2, 2)))
                tl.store(codes + row * ((k + 1) // 2) + first // 2, (low | (high << 4)).to(tl.uint8), mask=present > 0)


@triton.jit
def quantize_rows(
    x, codes, scales, zeros, kept, stored, stored_zero, second,
    k, stored_step, clip, threshold, top, upper, lower, lowest_scale, largest_scale,
    STORED: tl.constexpr, OUTLIERS: tl.constexpr, SECOND: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_TYPE: tl.constexpr, RULE: tl.constexpr,
    LARGEST: tl.constexpr, TOP: tl.constexpr, ROUND_BITS: tl.constexpr, DIVIDES: tl.constexpr, INTEGER: tl.constexpr, LOW: tl.constexpr,
    RECIPROCAL: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, MAX: tl.constexpr, STORE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes and scale of one row of x [M, K].

    Args:
        kept:   uint8 [K], OUTLIERS: the columns that stay as they are; `threshold`: values that reach it do not count in the range.
        stored: STORED: float32 scales, stored_step apart; and their zero points.
        second: float32 [1], SECOND == "whole".
    """
    row = tl.program_id(0).to(tl.int64)
    if STORED:
        scale = tl.zeros((1,), tl.float32) + tl.load(stored + row * stored_step)
        zero = tl.zeros((1,), tl.float32) + tl.load(stored_zero)
    else:
        low, high, unordered = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.int32)
        for start in range(0, k, BLOCK):
            at = start + tl.arange(0, BLOCK)[None, :]
            values = tl.load(x + row * k + at, mask=at < k, other=0).to(tl.float32)
            if OUTLIERS:
                values = tl.where(tl.abs(values) >= threshold, 0.0, values)
            lowest, highest, none = range_of(values, at < k, 1)
            low, high, unordered = tl.minimum(low, lowest), tl.maximum(high, highest), tl.maximum(unordered, none)
        wide = tl.load(second) if SECOND == "whole" else 1.0
        wide = tl.zeros((1,), tl.float32) + wide
        scale, zero, _, _ = parameters(
            low * clip, high * clip, unordered, wide, top, upper, lower, lowest_scale, largest_scale,
            SYMMETRIC, LOW, SCALE_TYPE, RULE, LARGEST, TOP, ROUND_BITS, MANTISSA, DIVIDES,
        )  # fmt: skip
        tl.store(scales + row + tl.arange(0, 1), scale)
        tl.store(zeros + row + tl.arange(0, 1), zero)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        values = tl.load(x + row * k + at, mask=at < k, other=0).to(tl.float32)
        if OUTLIERS:
            values = tl.where(tl.load(kept + at, mask=at < k, other=1) != 0, 0.0, values)
        store_codes(codes, row, k, at, at < k, values, scale[:, None], zero[:, None], INTEGER, LOW, RECIPROCAL, BITS, MANTISSA, LOWEST, MAX, STORE, WIDE)


@triton.jit
def quantize_groups(
    x, codes, scales, zeros, scale_codes, second,
    k, group, groups, clip, top, upper, lower, lowest_scale, largest_scale,
    CLIPPED: tl.constexpr, SECOND: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_TYPE: tl.constexpr, RULE: tl.constexpr,
    LARGEST: tl.constexpr, TOP: tl.constexpr, ROUND_BITS: tl.constexpr, DIVIDES: tl.constexpr, INTEGER: tl.constexpr, LOW: tl.constexpr,
    RECIPROCAL: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, MAX: tl.constexpr, STORE: tl.constexpr, WIDE: tl.constexpr,
    SCALE_CODES: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Codes and scales of PER groups of one row of x [M, K].

    Args:
        CLIPPED:     values are cut to `clip` times the range of their whole row first.
        SECOND:      "none", "whole": float32 [1] at `second`, or "group": one for the PER groups, of their own values.
        SCALE_CODES: write the one-byte codes of the scales, without the second one, to scale_codes [M, groups]; "group" scales are left out.
        TILE, SIZE:  PER and `group`, rounded up to powers of two.
    """
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TILE)
    number = tl.program_id(1) * PER + index
    column = tl.arange(0, SIZE)
    at = number[:, None] * group + column[None, :]
    group_here = (index < PER) & (number < groups)
    here = group_here[:, None] & (column < group)[None, :] & (at < k)
    values = tl.load(x + row * k + at, mask=here, other=0).to(tl.float32)
    if CLIPPED:
        lowest, highest, torn = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.int32)
        for start in range(0, k, TILE * SIZE):
            place = start + tl.arange(0, TILE * SIZE)[None, :]
            found = range_of(tl.load(x + row * k + place, mask=place < k, other=0).to(tl.float32), place < k, 1)
            lowest, highest, torn = tl.minimum(lowest, found[0]), tl.maximum(highest, found[1]), tl.maximum(torn, found[2])
        cut = tl.minimum(tl.maximum(values, (lowest * clip)[:, None]), (highest * clip)[:, None])
        values = tl.where((torn > 0)[:, None], float("nan"), cut)
    low, high, unordered = range_of(values, here, 1)
    wide = tl.zeros((TILE,), tl.float32) + 1.0
    if SECOND == "whole":
        wide *= tl.load(second)
    elif SECOND == "group":
        peak = tl.maximum(tl.minimum(tl.maximum(-low, high), upper), lower)
        largest = tl.max(tl.where(group_here, peak, 0.0), axis=0)
        wide = tl.div_rn(wide * largest, wide * top)
        wide = tl.where(wide == 0.0, 1.0, wide)
    scale, zero, below, power = parameters(
        low, high, unordered, wide, top, upper, lower, lowest_scale, largest_scale,
        SYMMETRIC, LOW, SCALE_TYPE, RULE, LARGEST, TOP, ROUND_BITS, MANTISSA, DIVIDES,
    )  # fmt: skip
    if SCALE_CODES:
        if SCALE_TYPE == "e8m0":
            code = tl.where(unordered > 0, 255, power + 127)
        else:
            code = tl.where(unordered > 0, 127, small_float_code(below, 8, 3, -6))
        tl.store(scale_codes + row * groups + number, code.to(tl.uint8), mask=group_here)
    else:
        tl.store(scales + row * groups + number, scale, mask=group_here)
        tl.store(zeros + row * groups + number, zero, mask=group_here)
    store_codes(codes, row, k, at, here, values, scale[:, None], zero[:, None], INTEGER, LOW, RECIPROCAL, BITS, MANTISSA, LOWEST, MAX, STORE, WIDE)


_ROWS = {
    **dict.fromkeys(("x", "codes"), ""), **dict.fromkeys(("scales", "zeros", "stored", "stored_zero", "second"), "*fp32"), "kept": "*u8", "k": "i32", "stored_step": "i32",
    **dict.fromkeys(("clip", "threshold", "top", "upper", "lower", "lowest_scale", "largest_scale"), "fp32"),
}  # fmt: skip
_GROUPS = {
    **dict.fromkeys(("x", "codes"), ""), **dict.fromkeys(("scales", "zeros", "second"), "*fp32"), "scale_codes": "*u8", **dict.fromkeys(("k", "group", "groups"), "i32"),
    **dict.fromkeys(("clip", "top", "upper", "lower", "lowest_scale", "largest_scale"), "fp32"),
}  # fmt: skip
_INT8 = {
    "SYMMETRIC": True, "SCALE_TYPE": "float", "RULE": "ceil", "LARGEST": 0, "TOP": 0.0, "ROUND_BITS": 1, "DIVIDES": False, "INTEGER": True, "LOW": -128,
    "RECIPROCAL": False, "BITS": 8, "MANTISSA": 6, "LOWEST": 0, "MAX": 0.0, "STORE": "value", "WIDE": False, "SECOND": "none",
}  # fmt: skip
_FP4 = {**_INT8, "INTEGER": False, "LOW": 0, "BITS": 4, "MANTISSA": 1, "LOWEST": 0, "MAX": 6.0, "LARGEST": 2, "TOP": 6.0, "STORE": "nibble"}
_FP8 = {**_INT8, "INTEGER": False, "LOW": 0, "MANTISSA": 3, "LOWEST": -6, "MAX": 448.0}
COMPILE_EXAMPLES = [
    CompileExample(quantize_rows, {**_ROWS, "x": "*bf16", "codes": "*i8"}, {**_INT8, "STORED": False, "OUTLIERS": False, "BLOCK": 1024}, "int8"),
    CompileExample(
        quantize_rows, {**_ROWS, "x": "*fp16", "codes": "*i8"},
        {**_INT8, "SYMMETRIC": False, "RECIPROCAL": True, "STORED": False, "OUTLIERS": True, "BLOCK": 512}, "int8 asymmetric",
    ),
    CompileExample(quantize_rows, {**_ROWS, "x": "*bf16", "codes": "*fp8e4nv"}, {**_FP8, "STORED": False, "OUTLIERS": False, "BLOCK": 1024}, "fp8", "fp8_dot"),
    CompileExample(quantize_rows, {**_ROWS, "x": "*fp16", "codes": "*fp16"}, {**_FP8, "STORED": True, "OUTLIERS": False, "BLOCK": 512}, "fp8 stored"),
    CompileExample(
        quantize_groups, {**_GROUPS, "x": "*bf16", "codes": "*u8"},
        {**_FP4, "SCALE_TYPE": "e8m0", "CLIPPED": False, "SCALE_CODES": True, "PER": 32, "TILE": 32, "SIZE": 32}, "mx codes",
    ),
    CompileExample(
        quantize_groups, {**_GROUPS, "x": "*bf16", "codes": "*u8"},
        {**_FP4, "SCALE_TYPE": "e4m3", "SECOND": "whole", "CLIPPED": False, "SCALE_CODES": True, "PER": 64, "TILE": 64, "SIZE": 16}, "nvfp4 codes",
    ),
    CompileExample(
        quantize_groups, {**_GROUPS, "x": "*fp16", "codes": "*fp16"},
        {**_FP4, "STORE": "value", "SCALE_TYPE": "e8m0", "RULE": "even", "SECOND": "group", "CLIPPED": True, "SCALE_CODES": False, "PER": 3, "TILE": 4, "SIZE": 32}, "mx values",
    ),
    CompileExample(quantize_groups, {**_GROUPS, "x": "*bf16", "codes": "*i8"}, {**_INT8, "SYMMETRIC": False, "CLIPPED": False, "SCALE_CODES": False, "PER": 16, "TILE": 16, "SIZE": 128}, "int8"),
]  # fmt: skip
