"""Super-blocks of 256 elements whose sub-blocks have quantized scales: the K types.

Every value is one product with its sub-block's scale, itself the product of the block's float16 and a small integer, and
for some a difference with a minimum made the same way; all in float32, in the reference's order.
Source: formats specification, part 2, section 1.2; gguf package 0.19, quants.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.numerics.block_fields import bit_fields, halves_at, plane_groups
from bitgrain.numerics.plain_blocks import BITS, TWO_BITS

NIBBLES = (0, 4)


def _by_sub_block(values: Tensor, count: int) -> Tensor:
    """float32 [B, count, 256 / count]."""
    return values.reshape(values.shape[0], count, -1).float()


def decode_q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    scale = halves_at(blocks, 80) * (scales & 15).float()
    minimum = halves_at(blocks, 82) * (scales >> 4).float()
    codes = _by_sub_block(plane_groups(blocks[:, 16:80], 32, TWO_BITS, 2), 16)
    return (scale[..., None] * codes - minimum[..., None]).flatten(1)


def decode_q3_k(blocks: Tensor) -> Tensor:
    stored = blocks[:, 96:108]
    low = bit_fields(stored[:, :8], NIBBLES, 4).flatten(1)
    high = bit_fields(stored[:, 8:], TWO_BITS, 2).flatten(1)
    scale = halves_at(blocks, 108) * ((low | high << 4).float() - 32)
    low_codes = plane_groups(blocks[:, 32:96], 32, TWO_BITS, 2)
    third = plane_groups(blocks[:, :32], 32, BITS, 1)
    codes = _by_sub_block((low_codes | third << 2).to(torch.int8) - 4, 16)
    return (scale[..., None] * codes).flatten(1)


def _scales_and_minima(stored: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [B, 8] each, six bits, of the 12 bytes that Q4_K and Q5_K share."""
    first, second, third = stored[:, :4], stored[:, 4:8], stored[:, 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    return scales, minima


def _with_minima(blocks: Tensor, codes: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale = halves_at(blocks, 0) * scales.float()
    minimum = halves_at(blocks, 2) * minima.float()
    return (scale[..., None] * _by_sub_block(codes, 8) - minimum[..., None]).flatten(1)


def decode_q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, plane_groups(blocks[:, 16:], 32, NIBBLES, 4))


def decode_q5_k(blocks: Tensor) -> Tensor:
    low = plane_groups(blocks[:, 48:], 32, NIBBLES, 4)
    fifth = plane_groups(blocks[:, 16:48], 32, BITS, 1)
    return _with_minima(blocks, low | fifth << 4)


def decode_q6_k(blocks: Tensor) -> Tensor:
    low = plane_groups(blocks[:, :128], 64, NIBBLES, 4)
    high = plane_groups(blocks[:, 128:192], 32, TWO_BITS, 2)
    codes = _by_sub_block((low | high << 4).to(torch.int8) - 32, 16)
    scale = halves_at(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scale[..., None] * codes).flatten(1)


K_BLOCKS = {"Q2_K": decode_q2_k, "Q3_K": decode_q3_k, "Q4_K": decode_q4_k, "Q5_K": decode_q5_k, "Q6_K": decode_q6_k}
