"""Weights in packed blocks: codes as aligned planes with their scales beside them, or the blocks as they are stored.

Types whose codes are plain fields are taken apart once: planes of codes, 16-bit scales and minima per span, a byte per sub-block.  That is as
large as the stored blocks, or up to 4 % larger where six-bit sub-scales become bytes.  Types that look entries up stay as they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels import block_layouts as layouts
from bitgrain.kernels.triton.codebooks import split_planes, strides
from bitgrain.kernels.triton.decoded import DecodedLinear, Layout
from bitgrain.numerics.block_types import BLOCK_TYPES
from bitgrain.numerics.lattice_blocks import LEVELS
from bitgrain.numerics.lattice_grids import lattice_grid
from bitgrain.weights import SuperBlockWeight, Weight, WeightSpec

# as in block_decoders, which cannot be imported before triton is
NUMBER, DOUBLED, LEVEL = 0, 1, 2
SUBS = {layouts.NO_SUB: 0, layouts.UNSIGNED_SUB: 1, layouts.SIGNED_SUB: 2, layouts.NIBBLE_SUB: 3}
MINIMA = {layouts.NO_MINIMUM: 0, layouts.ADDED_MINIMUM: 1, layouts.SCALED_MINIMUM: 2}
CODES = {
    layouts.CODE_1: (1, DOUBLED), layouts.CODE_2: (2, NUMBER), layouts.CODE_3: (3, NUMBER), layouts.CODE_4: (4, NUMBER), layouts.CODE_5: (5, NUMBER),
    layouts.CODE_6: (6, NUMBER), layouts.LEVELS_4: (4, LEVEL),
}  # fmt: skip
# types whose entries come from tables: number of the type, table, columns that share a scale
POINTS = {
    "IQ2_XXS": (0, "IQ2_XXS", 32), "IQ2_XS": (1, "IQ2_XS", 16), "IQ2_S": (2, "IQ2_S", 16), "IQ3_XXS": (3, "IQ3_XXS", 32), "IQ3_S": (4, "IQ3_S", 32),
    "IQ1_S": (5, "IQ1_S", 32), "IQ1_M": (6, "IQ1_S", 16),
}  # fmt: skip
TERNARY = "TQ1_0"  # base-3 digits
# Rows that are taken apart at once: bounds the working set, a few bytes per weight.
ROWS_AT_ONCE = 1024


class SuperBlockLinear(DecodedLinear):
    """y = sum over groups of scale * dot(number, x) + minimum * sum(x); numbers are exact in 16 bits, scales join the float32 sums."""

    name = "triton.super_block"
    kind = "super_block"

    def limit(self, weight: WeightSpec) -> str:
        kind = weight.element.upper()
        return "" if kind in layouts.SUPER_LAYOUTS or kind in POINTS else f"has no decoder for {weight.element} blocks"

    def layout(self, weight: Weight) -> Layout:
        assert isinstance(weight, SuperBlockWeight)  # refusal() asked for the kind
        packed, kind = weight.packed, weight.kind
        if kind == TERNARY:
            return Layout("block_decoders.decode_ternary", [packed], (packed.shape[1],), (0,), True, 32)
        if kind in POINTS:
            number, table, group = POINTS[kind]
            grid = lattice_grid(table).to(torch.int8).to(packed.device)
            return Layout("block_decoders.decode_points", [packed, grid], (packed.shape[1], BLOCK_TYPES[kind].nbytes), (number,), True, group)
        return _planes_of(packed, kind)


def _planes_of(packed: Tensor, kind: str) -> Layout:
    """Blocks uint8 [N, bytes] taken apart."""
    layout = layouts.SUPER_LAYOUTS[kind][0]
    bits, number = CODES[layout.code]
    pieces = [_rows_apart(packed[start : start + ROWS_AT_ONCE], kind, bits) for start in range(0, packed.shape[0], ROWS_AT_ONCE)]
    parts: list[Tensor | None] = []
    for column in zip(*pieces, strict=True):
        held = [part for part in column if part is not None]
        parts.append(torch.cat(held) if held else None)
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=packed.device) if number == LEVEL else None
    scale = parts[3]
    assert scale is not None  # every type has one
    settings = (bits, number, layout.zero if number != LEVEL else 0, SUBS[layout.sub], MINIMA[layout.minimum], layout.span // layout.group)
    return Layout("block_decoders.decode_planes", [*parts, levels], (*strides(parts[:3]), scale.shape[1]), settings, True, layout.group)


def _rows_apart(packed: Tensor, kind: str, bits: int) -> list[Tensor | None]:
    """Three planes of codes, scale, minima, sub, sub_minima of some rows, each [rows, ...] or None."""
    n = packed.shape[0]
    fields = layouts.SUPER_LAYOUTS[kind][1](packed.reshape(-1, BLOCK_TYPES[kind].nbytes))
    codes, *rest = (None if field is None else field.reshape(n, -1) for field in fields)
    assert codes is not None  # every type has them
    return [*split_planes(codes, bits), *rest]
