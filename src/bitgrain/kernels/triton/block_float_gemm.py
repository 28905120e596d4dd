"""Products with matrices of small floats in blocks, in Triton: decoded in registers, sums in float32, parts of K added in a fixed order.

The weight is the left operand: where instructions read that one from registers, decoded values need no way through shared memory.
This module imports triton, and is imported only when a product runs.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from bitgrain.kernels.triton.ahead import CompileExample
from bitgrain.kernels.triton.rounding import narrowed, power_of_two

# What the scales of blocks are, and how they take part.
E8M0, E4M3, E5M3 = 0, 1, 2
FOLDED, PIECES, WIDE_VALUES = 0, 1, 2


@triton.jit
def small_float_value(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """float32 of int32 codes of a small float; BITS of 0: two's complement with six fractional bits."""
    if BITS == 0:
        value = ((code << 24) >> 24).to(tl.float32) * 0.015625
    else:
        magnitude = code & ((1 << (BITS - 1)) - 1)
        exponent, mantissa = magnitude >> MANTISSA, magnitude & ((1 << MANTISSA) - 1)
        normal = (((exponent + (127 - BIAS)) << 23) | (mantissa << (23 - MANTISSA))).to(tl.float32, bitcast=True)
        value = tl.where(exponent == 0, mantissa.to(tl.float32) * 2.0 ** (1 - BIAS - MANTISSA), normal)
        value = tl.where(((code >> (BITS - 1)) & 1) != 0, -value, value)
    return value


@triton.jit
def scale_value(code, SCALE: tl.constexpr, shift):
    """float32 of int32 codes of scales; e8m0: of their exponents less `shift`."""
    if SCALE == 0:
        value = power_of_two(code - 127 - shift)
    elif SCALE == 1:
        value = small_float_value(code, 8, 3, 7)
    else:
        value = small_float_value(code, 9, 3, 15)  # without a sign
    return value


@triton.jit
def decoded_tile(low, high, row, start, low_bytes, high_bytes, WIDTH: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, BLOCK_K: tl.constexpr):
    """float32 [BLOCK_N, BLOCK_K] of the columns from `start` on, a multiple of 4; numbers behind the row's end mean nothing.

    Args:
        low:  uint8 [N, low_bytes]: WIDTH 8: codes, 4 and 6: their lower four bits, the even column in the low nibble.
        high: uint8 [N, high_bytes], WIDTH 6: their upper two bits, four columns in a byte, the first lowest.
    """
    if WIDTH == 8:
        at = start + tl.arange(0, BLOCK_K)
        code = tl.load(low + row[:, None] * low_bytes + at[None, :], mask=(at < low_bytes)[None, :], other=0).to(tl.int32)
    else:
        at = start // 2 + tl.arange(0, BLOCK_K // 2)
        pair = tl.load(low + row[:, None] * low_bytes + at[None, :], mask=(at < low_bytes)[None, :], other=0).to(tl.int32)
        code = tl.interleave(pair & 15, pair >> 4)
    if WIDTH == 6:
        at = start // 4 + tl.arange(0, BLOCK_K // 4)
        four = tl.load(high + row[:, None] * high_bytes + at[None, :], mask=(at < high_bytes)[None, :], other=0).to(tl.int32)
        even, odd = tl.interleave(four & 3, (four >> 4) & 3), tl.interleave((four >> 2) & 3, four >> 6)
        code |= tl.interleave(even, odd) << 4
    return small_float_value(code, BITS, MANTISSA, BIAS)


@triton.jit
def column_scales(scale, row, start, k, group, groups, shift, SCALE: tl.constexpr, EXPAND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """float32 [BLOCK_N, BLOCK_K]: the scale of every column from `start` on.  EXPAND: columns per scale, where they divide the tile; else 0."""
    if EXPAND:
        place = start // EXPAND + tl.arange(0, BLOCK_K // EXPAND)
        few = tl.load(scale + row[:, None] * groups + place[None, :], mask=(place < groups)[None, :], other=0).to(tl.int32)
        values = scale_value(few, SCALE, shift)
        return tl.reshape(tl.broadcast_to(values[:, :, None], (BLOCK_N, BLOCK_K // EXPAND, EXPAND)), (BLOCK_N, BLOCK_K))
    at = start + tl.arange(0, BLOCK_K)
    code = tl.load(scale + row[:, None] * groups + (at // group)[None, :], mask=(at < k)[None, :], other=0)
    return scale_value(code.to(tl.int32), SCALE, shift)


@triton.jit
def finish(
    total, x_scale, second, bias, out, token, token_here, channel, channel_here, n, x_scale_step, second_step, unit,
    X_SCALED: tl.constexpr, SECOND: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scales of whole rows, bias, one rounding: out [M, N] from total [BLOCK_N, BLOCK_M]."""
    total *= unit
    if SECOND:
        total *= tl.load(second + channel * second_step, mask=channel_here, other=0)[:, None]
    if X_SCALED:
        total *= tl.load(x_scale + token * x_scale_step, mask=token_here, other=0)[None, :]
    if BIAS:
        total += tl.load(bias + channel, mask=channel_here, other=0).to(tl.float32)[:, None]
    here = channel_here[:, None] & token_here[None, :]
    tl.store(out + token[None, :] * n + channel[:, None], narrowed(total, out.dtype.element_ty, WIDE), mask=here)


@triton.jit
def add_parts(
    parts, x_scale, second, bias, out, m, n, x_scale_step, second_step, unit,
    PARTS: tl.constexpr, X_SCALED: tl.constexpr, SECOND: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """finish() of the sum of float32 parts [PARTS, M, N], in their order."""
    token, channel = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_here, channel_here = token < m, channel < n
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for part in range(PARTS):
        at = parts + (part * m + token[None, :]) * n + channel[:, None]
        total += tl.load(at, mask=channel_here[:, None] & token_here[None, :], other=0)
    finish(total, x_scale, second, bias, out, token, token_here, channel, channel_here, n, x_scale_step, second_step, unit, X_SCALED, SECOND, BIAS, WIDE)


@triton.jit
def block_float_gemm(
    x, x_scale, low, high, scale, second, bias, out,
    m, n, k, low_bytes, high_bytes, group, groups, second_group, seconds, second_step, x_group, x_groups, x_scale_step, chunk, piece, shift, unit,
    MODE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, EXPAND: tl.constexpr,
    SECOND: tl.constexpr, X_SCALED: tl.constexpr, BIASED: tl.constexpr, INSIDE: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over k of x[m, k] * element(code[n, k]) * scale[n, k // group], second scales and scales of x as below (+ bias).

    Args:
        x:        [M, K] float32 or 16-bit: values, or codes of a quantized input.
        x_scale:  float32 [M or 1, x_groups].
        low, high: the codes, see decoded_tile().
        scale:    uint8 [N, groups].
        second:   float32 [N or 1, seconds].
        out:      [M, N]; PARTS: float32 [parts, M, N], the sums of `chunk` columns each.
        chunk:    columns that are added up by themselves; INSIDE of them in one program, in order.
        piece:    columns whose sum is multiplied at once; a multiple of 4 that divides `chunk`.
        MODE:     0: decoded values take their scale along, exact in x's type; 1: a piece's sum takes it; 2: float32 values take both scales along.
        SECOND:   0: none, 1: of whole rows, 2: of groups of columns.
        X_SCALED: 0: no, 1: of whole rows, 2: of groups of columns.
        WIDE:     multiply in float32: the interpreter's 16-bit brain floats are only storage.
    """
    token, channel = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_here, channel_here = token < m, channel < n
    row = tl.where(channel_here, channel, 0).to(tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for turn in range(INSIDE):
        first = (tl.program_id(2) * INSIDE + turn) * chunk
        last = tl.minimum(first + chunk, k)
        subtotal = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for start in range(first, last, piece):
            part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for inner in range(0, tl.minimum(piece, last - start), BLOCK_K):
                place = inner + tl.arange(0, BLOCK_K)
                at = start + place
                here = (place < piece) & (at < last)
                values = tl.load(x + token[None, :] * k + at[:, None], mask=here[:, None] & token_here[None, :], other=0)
                w = decoded_tile(low, high, row, start + inner, low_bytes, high_bytes, WIDTH, BITS, MANTISSA, BIAS, BLOCK_K)
                if MODE != 1:
                    w *= column_scales(scale, row, start + inner, k, group, groups, shift, SCALE, EXPAND, BLOCK_N, BLOCK_K)
                if MODE == 2 and SECOND == 2:
                    w *= tl.load(second + row[:, None] * second_step + (at // second_group)[None, :], mask=here[None, :], other=0)
                if WIDE or MODE == 2:
                    part = tl.dot(w, values.to(tl.float32), part, input_precision="ieee")
                else:
                    part = tl.dot(w.to(values.dtype), values, part, input_precision="ieee")
            if MODE == 1:
                code = tl.load(scale + row * groups + start // group)
                part *= scale_value(code.to(tl.int32), SCALE, 0)[:, None]
            if MODE != 2 and SECOND == 2:
                part *= tl.load(second + row * second_step + start // second_group)[:, None]
            if X_SCALED == 2:
                part *= tl.load(x_scale + token * x_groups + start // x_group, mask=token_here, other=0)[None, :]
            subtotal += part
        total += subtotal
    if PARTS:
        at = out + (tl.program_id(2) * m + token[None, :]) * n + channel[:, None]
        tl.store(at, total, mask=channel_here[:, None] & token_here[None, :])
    else:
        finish(total, x_scale, second, bias, out, token, token_here, channel, channel_here, n, x_scale_step, second_step, unit, X_SCALED == 1, SECOND == 1, BIASED, WIDE)


@triton.jit
def scaled_tile(pointer, row, bytes, start, here_rows, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """uint8 [rows, BLOCK / PACKED] of a row's codes from column `start` on; zero behind its end."""
    at = start // PACKED + tl.arange(0, BLOCK // PACKED)
    return tl.load(pointer + row[:, None] * bytes + at[None, :], mask=here_rows[:, None] & (at < bytes)[None, :], other=0)


@triton.jit
def scaled_scales(pointer, row, count, start, here_rows, GROUP: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """uint8 [rows, BLOCK / GROUP] of a row's scales from column `start` on; one behind its end."""
    at = start // GROUP + tl.arange(0, BLOCK // GROUP)
    return tl.load(pointer + row[:, None] * count + at[None, :], mask=here_rows[:, None] & (at < count)[None, :], other=ONE)


@triton.jit
def spread(codes, scales, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [ROWS, BLOCK]: the numbers of a tile with e4m3 scales."""
    code = codes.to(tl.int32)
    if WIDTH == 4:
        code = tl.interleave(code & 15, code >> 4)
    factor = small_float_value(scales.to(tl.int32), 8, 3, 7)
    wide = tl.reshape(tl.broadcast_to(factor[:, :, None], (ROWS, BLOCK // GROUP, GROUP)), (ROWS, BLOCK))
    return small_float_value(code, WIDTH, MANTISSA, BIAS) * wide


@triton.jit
def scaled_gemm(
    x, x_blocks, x_scale, low, scale, second, bias, out,
    m, n, k, low_bytes, x_bytes, groups, second_step, x_scale_step, chunk, unit,
    WIDTH: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, FORMAT: tl.constexpr, X_WIDTH: tl.constexpr, X_MANTISSA: tl.constexpr, X_BIAS: tl.constexpr,
    X_FORMAT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, X_BLOCKED: tl.constexpr, X_SCALED: tl.constexpr, SECOND: tl.constexpr,
    BIASED: tl.constexpr, INSIDE: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As block_float_gemm(), by instructions that multiply codes and scales of both sides.

    Args:
        x:        uint8 [M, x_bytes], codes.
        x_blocks: uint8 [M, groups], X_BLOCKED: the scales of its blocks, of the weight's type and size.
        x_scale:  float32 [M or 1], X_SCALED: a factor of its rows.
        WIDE:     the interpreter reads every scale as e8m0: others are multiplied here.
    """
    token, channel = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_here, channel_here = token < m, channel < n
    row, line = tl.where(channel_here, channel, 0).to(tl.int64), tl.where(token_here, token, 0)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for turn in range(INSIDE):
        first = (tl.program_id(2) * INSIDE + turn) * chunk
        part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for start in range(first, tl.minimum(first + chunk, k), BLOCK_K):
            w = scaled_tile(low, row, low_bytes, start, channel_here, 2 if WIDTH == 4 else 1, BLOCK_K)
            w_scale = scaled_scales(scale, row, groups, start, channel_here, GROUP, 127 if SCALE == 0 else 56, BLOCK_K)
            values = scaled_tile(x, line, x_bytes, start, token_here, 2 if X_WIDTH == 4 else 1, BLOCK_K)
            if X_BLOCKED:
                blocks = scaled_scales(x_blocks, line, groups, start, token_here, GROUP, 127 if SCALE == 0 else 56, BLOCK_K)
                if SCALE == 0:
                    part = tl.dot_scaled(w, w_scale, FORMAT, tl.trans(values), blocks, X_FORMAT, part)
                elif WIDE:
                    wide = spread(w, w_scale, WIDTH, MANTISSA, BIAS, GROUP, BLOCK_N, BLOCK_K)
                    other = spread(values, blocks, X_WIDTH, X_MANTISSA, X_BIAS, GROUP, BLOCK_M, BLOCK_K)
                    part = tl.dot(wide, tl.trans(other), part, input_precision="ieee")
                else:
                    e4m3 = tl.float8e4nv
                    part = tl.dot_scaled(w, w_scale.to(e4m3, bitcast=True), FORMAT, tl.trans(values), blocks.to(e4m3, bitcast=True), X_FORMAT, part)
            else:
                # without a scale of its own on each side the product would be one of wider floats
                ones = tl.full((BLOCK_M, BLOCK_K // GROUP), 127, tl.uint8)
                part = tl.dot_scaled(w, w_scale, FORMAT, tl.trans(values), ones, X_FORMAT, part)
        total += part
    if PARTS:
        at = out + (tl.program_id(2) * m + token[None, :]) * n + channel[:, None]
        tl.store(at, total, mask=channel_here[:, None] & token_here[None, :])
    else:
        finish(total, x_scale, second, bias, out, token, token_here, channel, channel_here, n, x_scale_step, second_step, unit, X_SCALED, SECOND, BIASED, WIDE)


_NUMBERS = (
    "m", "n", "k", "low_bytes", "high_bytes", "group", "groups", "second_group", "seconds", "second_step", "x_group", "x_groups", "x_scale_step", "chunk", "piece",
    "shift",
)  # fmt: skip
_TYPES = {
    "x": "*bf16", "x_scale": "*fp32", "low": "*u8", "high": "*u8", "scale": "*u8", "second": "*fp32", "bias": "*bf16", "out": "*bf16",
    **dict.fromkeys(_NUMBERS, "i32"), "unit": "fp32",
}  # fmt: skip
_FP4 = {
    "MODE": 0, "WIDTH": 4, "BITS": 4, "MANTISSA": 1, "BIAS": 1, "SCALE": 0, "EXPAND": 32, "SECOND": 0, "X_SCALED": 0, "BIASED": False, "INSIDE": 1, "PARTS": False,
    "WIDE": False, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64,
}  # fmt: skip
_SCALED_TYPES = {
    "x": "*u8", "x_blocks": "*u8", "x_scale": "*fp32", "low": "*u8", "scale": "*u8", "second": "*fp32", "bias": "*bf16", "out": "*bf16",
    **dict.fromkeys(("m", "n", "k", "low_bytes", "x_bytes", "groups", "second_step", "x_scale_step", "chunk"), "i32"), "unit": "fp32",
}  # fmt: skip
_SCALED = {
    "WIDTH": 4, "MANTISSA": 1, "BIAS": 1, "FORMAT": "e2m1", "X_WIDTH": 4, "X_MANTISSA": 1, "X_BIAS": 1, "X_FORMAT": "e2m1", "SCALE": 0, "GROUP": 32, "X_BLOCKED": True,
    "X_SCALED": False, "SECOND": False, "BIASED": True, "INSIDE": 1, "PARTS": False, "WIDE": False, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128,
}  # fmt: skip
COMPILE_EXAMPLES = [
    CompileExample(block_float_gemm, {**_TYPES, "out": "*fp32"}, {**_FP4, "PARTS": True}, "fp4 parts"),
    CompileExample(block_float_gemm, _TYPES, {**_FP4, "SCALE": 1, "EXPAND": 16, "SECOND": 1, "BIASED": True, "BLOCK_M": 64, "INSIDE": 2}, "fp4 e4m3"),
    CompileExample(
        block_float_gemm, {**_TYPES, **dict.fromkeys(("x", "out", "bias"), "*fp16")},
        {**_FP4, "WIDTH": 6, "BITS": 6, "MANTISSA": 3, "MODE": 1, "EXPAND": 0, "X_SCALED": 2, "BLOCK_M": 32, "BLOCK_K": 32}, "fp6 pieces",
    ),
    CompileExample(block_float_gemm, _TYPES, {**_FP4, "MODE": 1, "SCALE": 2, "EXPAND": 0, "SECOND": 2, "BLOCK_K": 16}, "fp4 e5m3 pieces"),
    CompileExample(
        block_float_gemm, {**_TYPES, **dict.fromkeys(("x", "out", "bias"), "*fp32")},
        {**_FP4, "WIDTH": 8, "BITS": 0, "MANTISSA": 0, "BIAS": 0, "MODE": 2, "EXPAND": 0, "SECOND": 2}, "int8 wide",
    ),
    CompileExample(block_float_gemm, _TYPES, {**_FP4, "WIDTH": 8, "BITS": 8, "MANTISSA": 3, "BIAS": 7, "X_SCALED": 1}, "fp8"),
    CompileExample(
        add_parts, {**{name: _TYPES[name] for name in ("x_scale", "second", "bias", "out", "m", "n", "x_scale_step", "second_step", "unit")}, "parts": "*fp32"},
        {"PARTS": 4, "X_SCALED": True, "SECOND": True, "BIAS": True, "WIDE": False, "BLOCK_M": 16, "BLOCK_N": 64},
    ),
    CompileExample(scaled_gemm, _SCALED_TYPES, _SCALED, "mxfp4", "scaled_dot"),
    CompileExample(scaled_gemm, _SCALED_TYPES, {**_SCALED, "SCALE": 1, "GROUP": 16, "X_SCALED": True, "SECOND": True, "BLOCK_M": 16}, "nvfp4", "scaled_dot"),
    CompileExample(
        scaled_gemm, {**_SCALED_TYPES, "out": "*fp32"},
        {**_SCALED, "X_WIDTH": 8, "X_MANTISSA": 3, "X_BIAS": 7, "X_FORMAT": "e4m3", "X_BLOCKED": False, "X_SCALED": True, "PARTS": True}, "mxfp4 fp8", "scaled_dot",
    ),
    CompileExample(
        scaled_gemm, _SCALED_TYPES,
        {**_SCALED, "WIDTH": 8, "MANTISSA": 3, "BIAS": 7, "FORMAT": "e4m3", "X_WIDTH": 8, "X_MANTISSA": 3, "X_BIAS": 7, "X_FORMAT": "e4m3"}, "mxfp8", "scaled_dot",
    ),
]  # fmt: skip
