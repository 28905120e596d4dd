"""Super-blocks whose elements come from fixed tables: the IQ types.

    IQ2, IQ3   scale * entry, with signs stored apart: seven bits of which the eighth is the parity, or eight plain ones
    IQ1        scale * (entry +- 1/8)
    IQ4        scale * one of sixteen levels per element
Source: formats specification, part 2, section 1.2; gguf package 0.19, quants.py.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bitgrain.numerics.block_fields import bit_fields, fields_in_turn, halves_at, nibble_halves, words_at
from bitgrain.numerics.lattice_grids import lattice_grid
from bitgrain.numerics.plain_blocks import BITS, TWO_BITS

NIBBLES = (0, 4)
LEVELS = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
DELTA = 0.125


@cache
def _parity_signs() -> Tensor:
    """uint8 [128]: the index, and in bit 7 the parity of its bits; the number of minus signs is even."""
    index = torch.arange(128, dtype=torch.uint8)
    parity = sum((index >> bit) & 1 for bit in range(7)) & 1
    return index | torch.as_tensor(parity) << 7


def _signs(stored: Tensor) -> Tensor:
    """float32 [..., 8 n] of +-1 for sign bytes [..., n]: a set bit negates."""
    return 1 - 2 * fields_in_turn(stored, BITS, 1).float()


def _parity_coded(index: Tensor) -> Tensor:
    """+-1 for 7-bit indices [B, n]: float32 [B, 8 n]."""
    return _signs(_parity_signs().to(index.device)[index.long()])


def _entries(name: str, index: Tensor) -> Tensor:
    """float32 [B, n * width] of the table's entries for indices [B, n]."""
    return lattice_grid(name).to(index.device)[index.long()].flatten(1)


def _scaled(scale: Tensor, values: Tensor) -> Tensor:
    """Scales [B, s] times values [B, 256], each scale for 256 / s elements in a row."""
    return (scale[..., None] * values.view(*scale.shape, -1)).flatten(1)


def _nibble_scales(stored: Tensor) -> Tensor:
    return fields_in_turn(stored, NIBBLES, 4).float()


def decode_iq2_xxs(blocks: Tensor) -> Tensor:
    pairs = blocks[:, 2:].reshape(-1, 8, 8)
    index = pairs[..., :4].flatten(1)
    words = words_at(pairs[..., 4:].flatten(1), 0, 8, 4)
    scale = halves_at(blocks, 0) * (0.5 + (words >> 28).float()) * 0.25
    signs = _parity_coded(fields_in_turn(words, (0, 7, 14, 21), 7))
    return _scaled(scale, _entries("IQ2_XXS", index)) * signs


def decode_iq2_xs(blocks: Tensor) -> Tensor:
    words = words_at(blocks, 2, 32, 2)
    scale = halves_at(blocks, 0) * (0.5 + _nibble_scales(blocks[:, 66:])) * 0.25
    return _scaled(scale, _entries("IQ2_XS", words & 511)) * _parity_coded(words >> 9)


def decode_iq2_s(blocks: Tensor) -> Tensor:
    high = fields_in_turn(blocks[:, 66:74], TWO_BITS, 2).int()
    scale = halves_at(blocks, 0) * (0.5 + _nibble_scales(blocks[:, 74:])) * 0.25
    entries = _entries("IQ2_S", blocks[:, 2:34].int() | high << 8)
    return _scaled(scale, entries) * _signs(blocks[:, 34:66])


def decode_iq3_xxs(blocks: Tensor) -> Tensor:
    words = words_at(blocks, 66, 8, 4)
    scale = halves_at(blocks, 0) * (0.5 + (words >> 28).float()) * 0.5
    signs = _parity_coded(fields_in_turn(words, (0, 7, 14, 21), 7))
    return _scaled(scale, _entries("IQ3_XXS", blocks[:, 2:66])) * signs


def decode_iq3_s(blocks: Tensor) -> Tensor:
    high = fields_in_turn(blocks[:, 66:74], BITS, 1).int()
    scale = halves_at(blocks, 0) * (1 + 2 * _nibble_scales(blocks[:, 106:]))
    entries = _entries("IQ3_S", blocks[:, 2:66].int() | high << 8)
    return _scaled(scale, entries) * _signs(blocks[:, 74:106])


def decode_iq1_s(blocks: Tensor) -> Tensor:
    high = words_at(blocks, 34, 8, 2)
    scale = halves_at(blocks, 0) * (2 * (high >> 12 & 7) + 1).float()
    entries = _entries("IQ1_S", blocks[:, 2:34].int() | fields_in_turn(high, (0, 3, 6, 9), 3) << 8)
    delta = torch.where(high & 0x8000 == 0, DELTA, -DELTA)
    return _scaled(scale, _shifted(entries, delta))


def iq1_m_scale(blocks: Tensor) -> Tensor:
    """float32 [B, 1]: the float16 whose nibbles are the top ones of the four scale words, the first the lowest."""
    top = words_at(blocks, 48, 4, 2) >> 12
    word = top[:, 0] | top[:, 1] << 4 | top[:, 2] << 8 | top[:, 3] << 12
    return word.to(torch.int16).view(torch.float16).float()[:, None]


def decode_iq1_m(blocks: Tensor) -> Tensor:
    scale = iq1_m_scale(blocks) * (2 * fields_in_turn(words_at(blocks, 48, 4, 2), (0, 3, 6, 9), 3) + 1).float()
    high = fields_in_turn(blocks[:, 32:48], NIBBLES, 4).int()
    entries = _entries("IQ1_S", blocks[:, :32].int() | (high & 7) << 8)
    delta = torch.where(high & 8 == 0, DELTA, -DELTA)
    return _scaled(scale, _shifted(entries, delta))


def _shifted(entries: Tensor, delta: Tensor) -> Tensor:
    """Entries [B, 256] plus deltas [B, n], each for 256 / n elements in a row."""
    return (entries.view(*delta.shape, -1) + delta[..., None]).flatten(1)


def _levels(codes: Tensor) -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)[codes.long()]


def decode_iq4_nl(blocks: Tensor) -> Tensor:
    return halves_at(blocks, 0) * _levels(nibble_halves(blocks[:, 2:]))


def decode_iq4_xs(blocks: Tensor) -> Tensor:
    high = words_at(blocks, 2, 1, 2)
    low = fields_in_turn(blocks[:, 4:8], NIBBLES, 4).int()
    scale = halves_at(blocks, 0) * ((low | fields_in_turn(high, tuple(range(0, 16, 2)), 2) << 4) - 32).float()
    codes = bit_fields(blocks[:, 8:].reshape(-1, 8, 16), NIBBLES, 4).flatten(1)
    return _scaled(scale, _levels(codes))


LATTICE_BLOCKS = {
    "IQ2_XXS": decode_iq2_xxs,
    "IQ2_XS": decode_iq2_xs,
    "IQ2_S": decode_iq2_s,
    "IQ3_XXS": decode_iq3_xxs,
    "IQ3_S": decode_iq3_s,
    "IQ1_S": decode_iq1_s,
    "IQ1_M": decode_iq1_m,
    "IQ4_NL": decode_iq4_nl,
    "IQ4_XS": decode_iq4_xs,
}
