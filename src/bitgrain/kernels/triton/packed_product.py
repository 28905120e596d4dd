"""The product of rows of an input with a packed weight, as functions that kernels are made of.

One source for every device that Triton compiles for.  This module imports triton, and is imported only when a product runs.
The weight is the left operand of every product, so that decoded codes go from registers to where they are multiplied.

Constants that the functions share:
    BITS, UNIT    see kernels.triton.units: codes of BITS bits in units of UNIT slots
    KIND          how a code is decoded: INTEGER code - MIDDLE, E4M3, E5M2, E2M1 the value of that float
    DOT           which arithmetic multiplies: FLOATS of x's type (float32 where WIDE or COLUMNS), INT8 exactly in int32, FP8 of FLOAT8's type
    WIDE          multiply in float32: the interpreter's 16-bit brain floats are only storage
    ZERO          zero points beyond MIDDLE: 0 none, 1 an integer (of codes; int32 for INT8), 2 a float32, for each scale
    SCALES        what a scale of the weight covers: WHOLE row (applied by finish), SEGMENT, or one COLUMN or few
    POWERS        scales are bytes, the exponents of powers of two
    ROW_SCALED, GROUP_SCALED   the input has a float32 scale per row (applied by finish) or per group of columns
    SHIFTED       the input has an int zero point, for INT8; `sums` holds what it is multiplied with
    GATHER        slots look up their columns
    EVEN          no slot is empty
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

INTEGER, E4M3, E5M2, E2M1 = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
FLOATS, INT8, FP8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WHOLE, SEGMENT, COLUMN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def stored_codes(row_at, slot0, BITS: tl.constexpr, UNIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 [BLOCK_N, BLOCK_K] codes of the slots from slot0 on; row_at [BLOCK_N] points to the rows' first bytes."""
    slot = tl.arange(0, BLOCK_K)
    within = slot % UNIT
    at = row_at[:, None] + (slot0 // 8 * BITS + slot // UNIT * (UNIT * BITS // 8))[None, :]
    if BITS == 8:
        return tl.load(at + within[None, :]).to(tl.int32)
    # the widest plane comes first: 4, 2 or 1 bits
    FIRST: tl.constexpr = 4 if BITS >= 4 else (2 if BITS >= 2 else 1)
    R: tl.constexpr = UNIT * FIRST // 8
    codes = (tl.load(at + (within % R)[None, :]).to(tl.int32) >> (within // R * FIRST)[None, :]) & ((1 << FIRST) - 1)
    if BITS - FIRST >= 2:
        R2: tl.constexpr = UNIT // 4
        second = tl.load(at + (R + within % R2)[None, :]).to(tl.int32) >> (within // R2 * 2)[None, :]
        codes |= (second & 3) << FIRST
    if (BITS - FIRST) % 2 == 1:
        R1: tl.constexpr = UNIT // 8
        BEFORE: tl.constexpr = (BITS - 1) * UNIT // 8
        last = tl.load(at + (BEFORE + within % R1)[None, :]).to(tl.int32) >> (within // R1)[None, :]
        codes |= (last & 1) << (BITS - 1)
    return codes


@triton.jit
def decoded(codes, KIND: tl.constexpr, MIDDLE: tl.constexpr):
    """float32 of int32 codes: code - MIDDLE of integers, the value of floats; all exact in 16-bit floats."""
    if KIND == INTEGER:
        return (codes - MIDDLE).to(tl.float32)
    if KIND == E2M1:
        exponent, mantissa = (codes >> 1) & 3, codes & 1
        value = tl.where(exponent == 0, mantissa * 2, (2 + mantissa) << exponent).to(tl.float32) * 0.25
        return tl.where((codes & 8) != 0, -value, value)
    # the bits of a float32, its bias 127 in place of the type's own; subnormals are multiples of the smallest one
    if KIND == E4M3:
        exponent, mantissa = (codes >> 3) & 15, codes & 7
        normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
        value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    else:
        exponent, mantissa = (codes >> 2) & 31, codes & 3
        normal = (((exponent + 112) << 23) | (mantissa << 21)).to(tl.float32, bitcast=True)
        value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.0000152587890625, normal)
    return tl.where((codes & 128) != 0, -value, value)


@triton.jit
def scales_at(pointer, offsets, POWERS: tl.constexpr):
    """float32 scales; of bytes, the powers of two that they are the exponents of."""
    stored = tl.load(pointer + offsets)
    if POWERS:
        wide = stored.to(tl.int32)
        bits = tl.where(wide == 0, 0x400000, wide << 23)  # 2^-127 is a subnormal
        return bits.to(tl.float32, bitcast=True)
    return stored.to(tl.float32)


@triton.jit
def product(
    a, a_scale, a_zero, codes, scale, zero, sums, gather, source, row, scale_row, first, last,
    k, segment, width, segments, row_bytes, w_group, w_groups, a_group, a_step,
    BITS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr, DOT: tl.constexpr, FLOAT8: tl.constexpr, WIDE: tl.constexpr,
    ZERO: tl.constexpr, SCALES: tl.constexpr, POWERS: tl.constexpr, GROUP_SCALED: tl.constexpr, SHIFTED: tl.constexpr, GATHER: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M] sum over the steps first ... last - 1 of BLOCK_K slots, scaled as far as finish() does not do it.

    int32 where DOT is INT8 and SCALES is WHOLE and nothing in the loop scales it, else float32.

    Args:
        a:         [A, K], float, int8 or uint8 codes of floats; the row source[m] of it is multiplied.
        a_scale:   float32 [A or 1, groups of a_group columns]; a_zero: float32 of the same shape, integers.
        a_step:    elements from one row of them to the next; 0: one row for all.
        codes:     uint8 [N, row_bytes]; the rows `row` of it are multiplied, whose scales are the rows `scale_row`.
        segment, width, segments: as in Slots.
        scale:     [S, w_groups]; zero: of the same shape, int16, int32 or float32.
        sums:      int32 [N, segments]: over the columns of a segment, code - zero.
        gather:    int32 [slots], the column of a slot or -1.
        source:    int64 [BLOCK_M]; row, scale_row: int64 [BLOCK_N].
    """
    RAW: tl.constexpr = DOT == INT8 and SCALES == WHOLE and not GROUP_SCALED
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if RAW else tl.float32)
    row_at = codes + row * row_bytes
    slot = tl.arange(0, BLOCK_K)
    a_row = a + source * k
    for step in range(first, last):
        slot0 = step * BLOCK_K
        part = slot0 // width
        if GATHER:
            column = tl.load(gather + slot0 + slot)
            here = column >= 0
        else:
            inner = slot0 - part * width + slot
            column = part * segment + inner
            here = (inner < segment) & (column < k)
        if EVEN:
            x = tl.load(a_row[None, :] + column[:, None])
        else:
            x = tl.load(a_row[None, :] + column[:, None], mask=here[:, None], other=0)
        held = stored_codes(row_at, slot0, BITS, UNIT, BLOCK_K)
        # of gathered columns, the segments are the groups
        group = part if GATHER else part * segment // w_group
        scale_at = scale_row * w_groups + group
        a_part = part * segment // a_group if GROUP_SCALED else 0
        if DOT == INT8:
            term = tl.dot((held - MIDDLE).to(tl.int8), x, out_dtype=tl.int32)
            if ZERO == 1:
                term -= tl.load(zero + scale_at)[:, None] * tl.sum(x.to(tl.int32), axis=0)[None, :]
            if SHIFTED:
                shift = tl.load(a_zero + source * a_step + a_part).to(tl.int32)
                # a segment's sum belongs to its first step
                shift = tl.where(slot0 == part * width, shift, 0)
                term -= tl.load(sums + row * segments + part)[:, None] * shift[None, :]
        elif DOT == FP8:
            w = held.to(tl.uint8).to(FLOAT8, bitcast=True)
            # sums of so many products may be added up in fewer digits than float32 has
            term = tl.dot(w, x.to(FLOAT8, bitcast=True), max_num_imprecise_acc=min(128, BLOCK_K))
        else:
            if ZERO == 1:
                held -= tl.load(zero + scale_at).to(tl.int32)[:, None]
            value = decoded(held, KIND, MIDDLE)
            if SCALES == COLUMN:
                at = scale_row[:, None] * w_groups + tl.where(here, column // w_group, 0)[None, :]
                if ZERO == 2:
                    value -= tl.load(zero + at)
                value *= scales_at(scale, at, POWERS)
            if WIDE or SCALES == COLUMN:
                term = tl.dot(value, x.to(tl.float32), input_precision="ieee")
            else:
                term = tl.dot(value.to(x.dtype), x, input_precision="ieee")
            if ZERO == 2 and SCALES != COLUMN:
                term -= tl.load(zero + scale_at)[:, None] * tl.sum(x.to(tl.float32), axis=0)[None, :]
        if RAW:
            acc += term
        else:
            term = term.to(tl.float32)
            if SCALES == SEGMENT:
                term *= scales_at(scale, scale_at, POWERS)[:, None]
            if GROUP_SCALED:
                term *= tl.load(a_scale + source * a_step + a_part)[None, :]
            acc += term
    return acc


@triton.jit
def finish(
    acc, a_scale, a_step, scale, bias, source, row, scale_row,
    SCALES: tl.constexpr, POWERS: tl.constexpr, ROW_SCALED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_M]: what product() gave for all steps, with the scales that cover whole rows, and the bias.

    Args:
        a_step: 0 where one scale is that of all rows of the input, else 1.
        bias:   [N], of any float type.
    """
    y = acc.to(tl.float32)
    if SCALES == WHOLE:
        y *= scales_at(scale, scale_row, POWERS)[:, None]
    if ROW_SCALED:
        y *= tl.load(a_scale + source * a_step)[None, :]
    if BIAS:
        y += tl.load(bias + row).to(tl.float32)[:, None]
    return y
