"""Blocks of small integers with one scale: the codes themselves, and the types whose values are a product and a sum.

    Q4_0, Q5_0, Q8_0, Q2_0, TQ2_0   d (code - offset)
    Q4_1, Q5_1                      d code + m
    Q1_0                            d or -d
    TQ1_0                           d t, t in {-1, 0, 1} from base-3 fractions
Source: formats specification, part 2, section 1.2; gguf package 0.19, quants.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.numerics.block_fields import bit_fields, fields_in_turn, halves_at, nibble_halves, plane_groups

BITS = tuple(range(8))
TWO_BITS = (0, 2, 4, 6)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """uint8 [B, 32]: bit j of the 32-bit word at byte `start`, for element j."""
    return fields_in_turn(blocks[:, start : start + 4], BITS, 1)


def codes_q4_0(blocks: Tensor) -> Tensor:
    return nibble_halves(blocks[:, 2:])


def codes_q5_0(blocks: Tensor) -> Tensor:
    return nibble_halves(blocks[:, 6:]) | _fifth_bits(blocks, 2) << 4


def codes_q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:] ^ 0x80  # two's complement becomes unsigned with an offset of 128


def codes_q2_0(blocks: Tensor) -> Tensor:
    return fields_in_turn(blocks[:, 2:], TWO_BITS, 2)


def codes_tq2_0(blocks: Tensor) -> Tensor:
    return plane_groups(blocks[:, :64], 32, TWO_BITS, 2)


def decode_q4_1(blocks: Tensor) -> Tensor:
    return halves_at(blocks, 0) * nibble_halves(blocks[:, 4:]).float() + halves_at(blocks, 2)


def decode_q5_1(blocks: Tensor) -> Tensor:
    codes = nibble_halves(blocks[:, 8:]) | _fifth_bits(blocks, 4) << 4
    return halves_at(blocks, 0) * codes.float() + halves_at(blocks, 2)


def decode_q1_0(blocks: Tensor) -> Tensor:
    bits = fields_in_turn(blocks[:, 2:], BITS, 1)
    return halves_at(blocks, 0) * (bits.float() * 2 - 1)


def decode_tq1_0(blocks: Tensor) -> Tensor:
    parts = []
    for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        # the product wraps at 256: what is left is the fraction after the digits before
        power = torch.tensor([3**n for n in range(digits)], dtype=torch.int32, device=blocks.device)
        fraction = (blocks[:, None, start:stop].int() * power[:, None]) & 0xFF
        parts.append((fraction * 3 >> 8).flatten(1))
    return halves_at(blocks, 52) * (torch.cat(parts, dim=1).float() - 1)


# type: codes of a block, and the code that means zero
INTEGER_BLOCKS = {
    "Q4_0": (codes_q4_0, 8),
    "Q5_0": (codes_q5_0, 16),
    "Q8_0": (codes_q8_0, 128),
    "Q2_0": (codes_q2_0, 1),
    "TQ2_0": (codes_tq2_0, 1),
}
PLAIN_BLOCKS = {"Q4_1": decode_q4_1, "Q5_1": decode_q5_1, "Q1_0": decode_q1_0, "TQ1_0": decode_tq1_0}


def codes_mxfp4(blocks: Tensor) -> Tensor:
    """uint8 [B, 32]: four-bit floats of a block; byte 0 is its exponent."""
    return nibble_halves(blocks[:, 1:])


def codes_nvfp4(blocks: Tensor) -> Tensor:
    """uint8 [B, 64]: four-bit floats of four sub-blocks of 16; bytes 0 to 3 are their scales."""
    return bit_fields(blocks[:, 4:].reshape(-1, 4, 8), (0, 4), 4).reshape(-1, 64)
