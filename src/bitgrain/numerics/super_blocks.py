"""Decoding of packed blocks whose values no simpler weight class holds: one function from bytes to float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bitgrain.numerics.block_fields import halves_at
from bitgrain.numerics.block_types import BLOCK_TYPES
from bitgrain.numerics.k_blocks import K_BLOCKS
from bitgrain.numerics.lattice_blocks import LATTICE_BLOCKS, iq1_m_scale
from bitgrain.numerics.plain_blocks import PLAIN_BLOCKS

# type: blocks uint8 [B, bytes] to float32 [B, elements]
SUPER_BLOCKS: Mapping[str, Callable[[Tensor], Tensor]] = {**PLAIN_BLOCKS, **K_BLOCKS, **LATTICE_BLOCKS}

# Blocks that are decoded at once: bounds the working set, a few times their float32 values.
BLOCKS_AT_ONCE = 1 << 15


def decode_blocks(packed: Tensor, kind: str) -> Tensor:
    """float32 [N, K] of rows of blocks uint8 [N, K / elements * bytes].

    Args:
        kind: a key of SUPER_BLOCKS.
    """
    layout, decode = BLOCK_TYPES[kind], SUPER_BLOCKS[kind]
    blocks = packed.reshape(-1, layout.nbytes)
    values = packed.new_empty(blocks.shape[0], layout.elements, dtype=torch.float32)
    for start in range(0, blocks.shape[0], BLOCKS_AT_ONCE):
        values[start : start + BLOCKS_AT_ONCE] = decode(blocks[start : start + BLOCKS_AT_ONCE])
    return values.view(packed.shape[0], packed.shape[1] // layout.nbytes * layout.elements)


def block_scales(packed: Tensor, kind: str) -> Tensor:
    """float32 [B, S]: the 16-bit scales of every block of packed bytes; S is 0 for types that have none."""
    blocks = packed.reshape(-1, BLOCK_TYPES[kind].nbytes)
    if kind == "IQ1_M":
        return iq1_m_scale(blocks)
    found = [halves_at(blocks, at) for at in BLOCK_TYPES[kind].scales]
    return torch.cat(found, dim=1) if found else blocks.new_empty(blocks.shape[0], 0, dtype=torch.float32)


def write_block_scales(blocks: Tensor, kind: str, scale: Tensor) -> None:
    """Set every 16-bit scale of blocks uint8 [B, bytes] to `scale` [B], rounded to float16, in place."""
    stored = scale.to(torch.float16).view(torch.uint8).view(-1, 2)
    for at in BLOCK_TYPES[kind].scales:
        blocks[:, at : at + 2] = stored
    if kind == "IQ1_M":
        nibbles = torch.stack((stored[:, 0] & 15, stored[:, 0] >> 4, stored[:, 1] & 15, stored[:, 1] >> 4), dim=1)
        top = blocks[:, 49:56:2]
        top.copy_(top & 15 | nibbles << 4)
