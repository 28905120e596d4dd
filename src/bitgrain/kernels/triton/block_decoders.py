"""Decoders of weights in blocks with one or two levels of scales.

Each is a function as weight_product describes them, of one group of columns that share a scale: its values are small integers, or
eighths, that are exact in 16-bit floats.  Values, scale and minimum joined are the numbers of numerics.super_blocks to the bit.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from bitgrain.kernels.triton.code_decoders import plane_codes

# What is multiplied with a span's scale, and what is added; as SETTINGS.
NO_SUB, UNSIGNED_SUB, SIGNED_SUB, NIBBLE_SUB = (tl.constexpr(i) for i in range(4))
NO_MINIMUM, ADDED_MINIMUM, SCALED_MINIMUM = (tl.constexpr(i) for i in range(3))
# How a code becomes a number.
NUMBER, DOUBLED, LEVEL = (tl.constexpr(i) for i in range(3))


@triton.jit
def decode_planes(parts, sizes, row, start, k, SETTINGS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(code - zero) * (scale * sub) + minimum.

    parts: three planes of codes; scale and minimum float16 [N, S]; sub and sub_minima uint8 [N, K / BLOCK_K]; levels float32 [16].
           What SETTINGS say is absent may be any tensor.
    sizes: the planes' bytes per row, S.
    SETTINGS: bits, how codes become numbers, zero, kind of sub, kind of minimum, groups per scale.
    """
    KIND: tl.constexpr = SETTINGS[1]
    SUB: tl.constexpr = SETTINGS[3]
    MINIMUM: tl.constexpr = SETTINGS[4]
    codes = plane_codes(parts, sizes, row, start, SETTINGS[0], BLOCK_K)
    if KIND == LEVEL:
        value = tl.load(parts[7] + codes)
    elif KIND == DOUBLED:
        value = (codes * 2 - SETTINGS[2]).to(tl.float32)
    else:
        value = (codes - SETTINGS[2]).to(tl.float32)
    group = row * (k // BLOCK_K) + start // BLOCK_K
    span = row * sizes[3] + start // (BLOCK_K * SETTINGS[5])
    scale = tl.load(parts[3] + span).to(tl.float32)
    if SUB != NO_SUB:
        sub = tl.load(parts[5] + group)
        if SUB == SIGNED_SUB:
            scale = scale * sub.to(tl.int8, bitcast=True).to(tl.float32)
        elif SUB == NIBBLE_SUB:
            scale = scale * (sub & 15).to(tl.float32)
        else:
            scale = scale * sub.to(tl.float32)
    if MINIMUM == NO_MINIMUM:
        return value, scale, None
    elif MINIMUM == ADDED_MINIMUM:
        return value, scale, tl.load(parts[4] + span).to(tl.float32)
    else:
        if SUB == NIBBLE_SUB:
            factor = (sub >> 4).to(tl.float32)
        else:
            factor = tl.load(parts[6] + group).to(tl.float32)
        return value, scale, -(tl.load(parts[4] + span).to(tl.float32) * factor)


@triton.jit
def _byte(block, at):
    return tl.load(block + at).to(tl.int32)


@triton.jit
def _word(block, at):
    """int32: the unsigned little-endian word of two bytes."""
    return _byte(block, at) | (_byte(block, at + 1) << 8)


@triton.jit
def _wide_word(block, at):
    """int32 with the bits of the little-endian word of four bytes."""
    return _word(block, at) | (_word(block, at + 2) << 16)


@triton.jit
def _half(bits):
    """float32 of the float16 with these bits."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _nibble(block, at, number):
    """Nibble `number` of the bytes from `at` on, the low one of a byte first."""
    return (_byte(block, at + number // 2) >> (4 * (number % 2))) & 15


@triton.jit
def _negated(value, signs, bit):
    return tl.where(((signs >> bit) & 1) != 0, -value, value)


@triton.jit
def _with_parity(signs):
    """Seven sign bits, and the parity of them as the eighth."""
    low = signs & 127
    parity = low ^ (low >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    return low | (parity << 7)


# in the order of their widths, so that comparisons tell them apart
IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S, IQ1_M = (tl.constexpr(i) for i in range(7))


@triton.jit
def _two_bit_points(block, wide, group, column, grid, TYPE: tl.constexpr):
    """(entries with their signs, sub-scale) of the types with eight entries per index and two bits each."""
    point = group * (4 if TYPE == IQ2_XXS else 2) + column // 8
    if TYPE == IQ2_XXS:
        word = _wide_word(block, 2 + 8 * group + 4)
        index = _byte(wide, 2 + 8 * group + column // 8)
        signs = _with_parity(word[:, None] >> (7 * (column // 8)))
        sub = (word >> 28) & 15
    elif TYPE == IQ2_XS:
        word = _word(wide, 2 + 2 * point)
        index, signs = word & 511, _with_parity(word >> 9)
        sub = _nibble(block, 66, group)
    else:
        index = _byte(wide, 2 + point) | (((_byte(wide, 66 + point // 4) >> (2 * (point % 4))) & 3) << 8)
        signs = _byte(wide, 34 + point)
        sub = _nibble(block, 74, group)
    value = tl.load(grid + index * 8 + column % 8).to(tl.float32)
    return _negated(value, signs, column % 8), (0.5 + sub.to(tl.float32)) * 0.25


@triton.jit
def _three_bit_points(block, wide, group, column, grid, TYPE: tl.constexpr):
    """The same of the types with four entries per index and three bits each."""
    point = group * 8 + column // 4
    if TYPE == IQ3_XXS:
        word = _wide_word(block, 66 + 4 * group)
        index = _byte(wide, 2 + point)
        signs = _with_parity(word[:, None] >> (7 * (column // 8)))
        scale = (0.5 + ((word >> 28) & 15).to(tl.float32)) * 0.5
    else:
        index = _byte(wide, 2 + point) | (((_byte(wide, 66 + point // 8) >> (point % 8)) & 1) << 8)
        signs = _byte(wide, 74 + group * 4 + column // 8)
        scale = 1 + 2 * _nibble(block, 106, group).to(tl.float32)
    value = tl.load(grid + index * 4 + column % 4).to(tl.float32)
    return _negated(value, signs, column % 8), scale


@triton.jit
def _one_bit_points(block, wide, group, column, grid, TYPE: tl.constexpr):
    """(entries moved up or down by an eighth, sub-scale) of the types with eight entries per index."""
    if TYPE == IQ1_S:
        point = group * 4 + column // 8
        word = _word(block, 34 + 2 * group)
        index = _byte(wide, 2 + point) | (((word[:, None] >> (3 * (column // 8))) & 7) << 8)
        down = (word >> 15)[:, None] & 1
        sub = (word >> 12) & 7
    else:
        point = group * 2 + column // 8
        high = _nibble(wide, 32, point)
        index = _byte(wide, point) | ((high & 7) << 8)
        down = high >> 3
        sub = (_word(block, 48 + 2 * (group // 4)) >> (3 * (group % 4))) & 7
    value = tl.load(grid + index * 8 + column % 8).to(tl.float32)
    return value + tl.where(down != 0, -0.125, 0.125), (2 * sub + 1).to(tl.float32)


@triton.jit
def decode_points(parts, sizes, row, start, k, SETTINGS: tl.constexpr, BLOCK_K: tl.constexpr):
    """scale * entry of a table, out of blocks as they are stored; BLOCK_K columns share a scale: 16 or 32.

    parts: packed uint8 [N, bytes], table int8 [entries, 4 or 8].
    sizes: bytes of a row, bytes of a block.
    SETTINGS: type.
    """
    TYPE: tl.constexpr = SETTINGS[0]
    block = parts[0] + row * sizes[0] + (start // 256) * sizes[1]
    group = (start % 256) // BLOCK_K
    column = tl.arange(0, BLOCK_K)[None, :]
    wide = block[:, None]
    if TYPE <= IQ2_S:
        value, sub = _two_bit_points(block, wide, group, column, parts[1], TYPE)
    elif TYPE <= IQ3_S:
        value, sub = _three_bit_points(block, wide, group, column, parts[1], TYPE)
    else:
        value, sub = _one_bit_points(block, wide, group, column, parts[1], TYPE)
    if TYPE == IQ1_M:
        bits = (_byte(block, 49) >> 4) | (_byte(block, 51) & 0xF0) | ((_byte(block, 53) & 0xF0) << 4) | ((_byte(block, 55) & 0xF0) << 8)
        scale = _half(bits)
    else:
        scale = _half(_word(block, 0))
    return value, scale * sub, None


@triton.jit
def decode_ternary(parts, sizes, row, start, k, SETTINGS: tl.constexpr, BLOCK_K: tl.constexpr):
    """scale * t, t in {-1, 0, 1}: five base-3 digits per byte, as fractions; a block is 256 columns of 54 bytes.

    parts: packed uint8 [N, bytes].
    sizes: bytes of a row.
    """
    block = parts[0] + row * sizes[0] + (start // 256) * 54
    e = start % 256 + tl.arange(0, BLOCK_K)
    rest, last = e - 160, e - 240
    digit = tl.where(e < 160, e // 32, tl.where(e < 240, rest // 16, last // 4))
    byte = tl.where(e < 160, e % 32, tl.where(e < 240, 32 + rest % 16, 48 + last % 4))
    power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    fraction = (_byte(block[:, None], byte[None, :]) * power[None, :]) & 255
    return ((fraction * 3 >> 8) - 1).to(tl.float32), _half(_word(block, 52)), None
