"""Decoders of weights that are looked up: tables, sums of codebooks, vectors, lattice points, trellises.

Each is a function as weight_product describes them; what its parts and sizes are is said in its docstring.  Every value is the
weight itself, in float32 and by the operations that the weight's class documents.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plane(pointer, stride, row, start, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 [rows, BLOCK_K]: fields of WIDTH bits of dense streams uint8 [N, stride], from column `start` on, a multiple of 8."""
    PER: tl.constexpr = 8 // WIDTH
    byte = start // PER + tl.arange(0, BLOCK_K // PER)
    stored = tl.load(pointer + row[:, None] * stride + byte[None, :], mask=(byte < stride)[None, :], other=0).to(tl.int32)
    if PER == 1:
        return stored
    fields = (stored[:, :, None] >> (tl.arange(0, PER) * WIDTH)[None, None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(fields, (row.shape[0], BLOCK_K))


@triton.jit
def plane_codes(parts, sizes, row, start, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 [rows, BLOCK_K]: codes of BITS bits out of up to three planes, as numerics.bitpack.PLANES splits them, the lowest first."""
    if BITS == 1 or BITS == 2 or BITS == 4 or BITS == 8:
        return plane(parts[0], sizes[0], row, start, BITS, BLOCK_K)
    elif BITS == 3:
        return plane(parts[0], sizes[0], row, start, 2, BLOCK_K) | (plane(parts[1], sizes[1], row, start, 1, BLOCK_K) << 2)
    elif BITS == 5:
        return plane(parts[0], sizes[0], row, start, 4, BLOCK_K) | (plane(parts[1], sizes[1], row, start, 1, BLOCK_K) << 4)
    else:
        low = plane(parts[0], sizes[0], row, start, 4, BLOCK_K) | (plane(parts[1], sizes[1], row, start, 2, BLOCK_K) << 4)
        if BITS == 7:
            low = low | (plane(parts[2], sizes[2], row, start, 1, BLOCK_K) << 6)
        return low


@triton.jit
def decode_lookup(parts, sizes, row, start, k, SETTINGS: tl.constexpr, BLOCK_K: tl.constexpr):
    """table[code] * scale.

    parts: three planes of codes, table float32 [1 or N, 2**bits], scale [N, G] of any float type.
    sizes: the planes' bytes per row, G, columns per scale.
    SETTINGS: bits; whether each row has a table; whether a block of columns never spans two scales.
    """
    at = start + tl.arange(0, BLOCK_K)
    codes = plane_codes(parts, sizes, row, start, SETTINGS[0], BLOCK_K)
    if SETTINGS[1]:
        value = tl.load(parts[3] + (row << SETTINGS[0])[:, None] + codes)
    else:
        value = tl.load(parts[3] + codes)
    if SETTINGS[2]:
        scale = tl.load(parts[4] + row * sizes[3] + start // sizes[4]).to(tl.float32)[:, None]
    else:
        scale = tl.load(parts[4] + row[:, None] * sizes[3] + (at // sizes[4])[None, :], mask=(at < k)[None, :], other=0).to(tl.float32)
    return tl.where((at < k)[None, :], value * scale, 0.0), None, None


@triton.jit
def decode_additive(parts, sizes, row, start, k, SETTINGS: tl.constexpr, BLOCK_K: tl.constexpr):
    """scale * sum over codebooks of entries.

    parts: codes int8 or int16 [N / h, K / g, C], codebooks [C, 2**bits, h, g], scale [N / h].
    sizes: none.
    SETTINGS: C, bits, h, g.
    """
    COUNT: tl.constexpr = SETTINGS[0]
    BITS: tl.constexpr = SETTINGS[1]
    H: tl.constexpr = SETTINGS[2]
    G: tl.constexpr = SETTINGS[3]
    at = start + tl.arange(0, BLOCK_K)
    here = (at < k)[None, :]
    code_at = ((row // H)[:, None] * (k // G) + (at // G)[None, :]) * COUNT
    inner = (row % H)[:, None] * G + (at % G)[None, :]
    total = tl.zeros((row.shape[0], BLOCK_K), dtype=tl.float32)
    for book in tl.static_range(COUNT):
        code = tl.load(parts[0] + code_at + book, mask=here, other=0).to(tl.int32) & ((1 << BITS) - 1)
        total += tl.load(parts[1] + ((book << BITS) + code) * (H * G) + inner, mask=here, other=0).to(tl.float32)
    return total * tl.load(parts[2] + row // H).to(tl.float32)[:, None], None, None


@triton.jit
def _unsigned(codes, BITS: tl.constexpr):
    return codes.to(tl.int32) & ((1 << BITS) - 1)


@triton.jit
def decode_vector(parts, sizes, row, start, k, SETTINGS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(centroid (+ residual centroid), or an outlier's) * column_scale + column_offset.

    parts: place int32 [K], the number of a column among those of its kind, minus one less that of an outlier; group int32
           [K - T]; codes, residual codes, outlier codes uint8 or int16 [vectors, columns]; their centroids float; column scale and
           offset [K].  What SETTINGS say is absent may be any tensor.
    sizes: columns that are no outliers, outliers, entries of a main codebook, entries of a residual one.
    SETTINGS: v, u (0: no outliers), whether there are groups, residuals, scales, offsets.
    """
    at = start + tl.arange(0, BLOCK_K)
    here = at < k
    place = tl.load(parts[0] + at, mask=here, other=0)
    is_main = (here & (place >= 0))[None, :]
    column = tl.maximum(place, 0)
    V: tl.constexpr = SETTINGS[0]
    U: tl.constexpr = SETTINGS[1]
    group = tl.zeros((BLOCK_K,), dtype=tl.int32)
    if SETTINGS[2]:
        group = tl.load(parts[1] + column, mask=here & (place >= 0), other=0)
    code_at = (row // V)[:, None] * sizes[0] + column[None, :]
    inner = (row % V)[:, None]
    code = tl.load(parts[2] + code_at, mask=is_main, other=0).to(tl.int32) & 0xFFFF
    value = tl.load(parts[5] + ((group * sizes[2])[None, :] + code) * V + inner, mask=is_main, other=0).to(tl.float32)
    if SETTINGS[3]:
        code = tl.load(parts[3] + code_at, mask=is_main, other=0).to(tl.int32) & 0xFFFF
        value += tl.load(parts[6] + ((group * sizes[3])[None, :] + code) * V + inner, mask=is_main, other=0).to(tl.float32)
    if U > 0:
        is_outlier = (here & (place < 0))[None, :]
        code_at = (row // U)[:, None] * sizes[1] + tl.maximum(-1 - place, 0)[None, :]
        code = tl.load(parts[4] + code_at, mask=is_outlier, other=0).to(tl.int32) & 0xFFFF
        value += tl.load(parts[7] + code * U + (row % U)[:, None], mask=is_outlier, other=0).to(tl.float32)
    if SETTINGS[4]:
        value = value * tl.load(parts[8] + at, mask=here, other=0).to(tl.float32)[None, :]
    if SETTINGS[5]:
        value = value + tl.load(parts[9] + at, mask=here, other=0).to(tl.float32)[None, :]
    return value, None, None


@triton.jit
def _lattice_point(magnitudes, code, column):
    """Entries of 16-bit e8p codes: a magnitude of the high byte's row, with a sign and a shift of the low one's.

    magnitudes: float16 [256, 8] with the signs of a low byte of 0, its shift not added.
    Source: numerics.e8_lattice, whose stored order puts the even coordinates first.
    """
    low = code & 255
    parity = low ^ (low >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    place = (column >> 1) + 4 * (column & 1)
    sign = ((low ^ parity) >> place) & 1
    value = tl.load(magnitudes + (code >> 8) * 8 + column).to(tl.float32)
    return tl.where(sign != 0, -value, value) + tl.where(parity != 0, -0.25, 0.25)


@triton.jit
def decode_lattice(parts, sizes, row, start, k, SETTINGS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Points of the lattice, with the residual's.

    parts: codes int16 [N, K / 8]; residual uint8 or int16 of the same shape; magnitudes float16 [256, 8]; ball float32 [256, 8],
           divided by the divisor.
    SETTINGS: bits of a residual code, 0, 8 or 16; what a residual of 16 bits is divided by.
    """
    at = start + tl.arange(0, BLOCK_K)
    here = (at < k)[None, :]
    code_at = row[:, None] * (k // 8) + (at // 8)[None, :]
    column = (at % 8)[None, :]
    value = _lattice_point(parts[2], _unsigned(tl.load(parts[0] + code_at, mask=here, other=0), 16), column)
    if SETTINGS[0] == 8:
        value += tl.load(parts[3] + tl.load(parts[1] + code_at, mask=here, other=0).to(tl.int32) * 8 + column)
    if SETTINGS[0] == 16:
        second = _lattice_point(parts[2], _unsigned(tl.load(parts[1] + code_at, mask=here, other=0), 16), column)
        value += tl.div_rn(second, tl.full(second.shape, SETTINGS[1], dtype=tl.float32))
    return tl.where(here, value, 0.0), None, None


LUT, QUANTLUT, QUANTLUT_SYM, ONE_MAD, TWO_MAD, THREE_INST = (tl.constexpr(i) for i in range(6))


@triton.jit
def _byte_sum(x):
    """(the sum of the bytes - 510) / 147.800537109375 of uint32."""
    total = (x & 255) + ((x >> 8) & 255) + ((x >> 16) & 255) + (x >> 24)
    wide = total.to(tl.float32) - 510.0
    return tl.div_rn(wide, tl.full(wide.shape, 147.800537109375, dtype=tl.float32))


@triton.jit
def _half_of(x):
    """float16 whose bits are the low 16 of uint32."""
    return x.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _state_value(table, state, place, DECODER: tl.constexpr, STEP: tl.constexpr, TABLE_BITS: tl.constexpr):
    """float32: value `place` of windows `state`, uint32; numerics.trellis_codes says how."""
    if DECODER == ONE_MAD:
        return _byte_sum(state * 34038481 + 76625530)
    elif DECODER == TWO_MAD:
        x = state * 264435761 + 1013904223
        return _byte_sum(((x.to(tl.uint64) * 1664525) >> 32).to(tl.uint32) + x)
    elif DECODER == THREE_INST:
        x = ((state * 89226354 + 64248484) & 0x8FFF8FFF) ^ 0x3B603B60
        return (_half_of(x >> 16) + _half_of(x)).to(tl.float32)
    elif DECODER == LUT:
        return tl.load(table + state.to(tl.int32) * STEP + place).to(tl.float32)
    else:
        z = state.to(tl.uint64) * (state.to(tl.uint64) + 1)
        SHIFT: tl.constexpr = (16 if DECODER == QUANTLUT else 15) - TABLE_BITS
        entry = ((z >> SHIFT) & ((1 << TABLE_BITS) - 1)).to(tl.int32)
        value = tl.load(table + entry * STEP + place).to(tl.float32)
        if DECODER == QUANTLUT_SYM:
            value = tl.where((((z >> 15) & 1) != 0) & (place == 0), -value, value)
        return value


@triton.jit
def decode_trellis(parts, sizes, row, start, k, SETTINGS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Windows of the tiles' bit streams.

    parts: packed uint8 [N / 16, K / 16, 32 bits], table float [2**b, V] (any tensor where values are computed).
    SETTINGS: bits, window, step, decoder, table bits, whether values stand in the order of a matrix instruction.
    """
    BITS: tl.constexpr = SETTINGS[0]
    WINDOW: tl.constexpr = SETTINGS[1]
    STEP: tl.constexpr = SETTINGS[2]
    at = start + tl.arange(0, BLOCK_K)
    here = (at < k)[None, :]
    r, c = (row % 16)[:, None].to(tl.int32), (at % 16)[None, :]
    if SETTINGS[5]:
        p = ((r & 7) << 5) | (((c >> 1) & 3) << 3) | ((c >> 3) << 2) | ((r >> 3) << 1) | (c & 1)
    else:
        p = r * 16 + c
    first = (p // STEP) * (BITS * STEP)
    stream = parts[0] + ((row // 16)[:, None] * (k // 16) + (at // 16)[None, :]) * (32 * BITS)
    wide = tl.zeros((row.shape[0], BLOCK_K), dtype=tl.uint32)
    for place in tl.static_range(4):
        byte = tl.load(stream + (first // 8 + place) % (32 * BITS), mask=here, other=0).to(tl.uint32)
        wide = wide | (byte << (24 - 8 * place))
    state = (wide >> (32 - WINDOW - first % 8).to(tl.uint32)) & ((1 << WINDOW) - 1)
    value = _state_value(parts[1], state, p % STEP, SETTINGS[3], STEP, SETTINGS[4])
    return tl.where(here, value, 0.0), None, None
