"""Which weights the block kernels take, and how: codes, scales of one or two levels, minima.

    weight = scale * sub * (u - zero) + minimum         u the unsigned code; a zero point of its own is a minimum of -scale * point

native/include/block_kernels.hpp says how they stand in memory.

Every part is stored in the precision that the checkpoint has it in; nothing is multiplied out, so nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.numerics.block_fields import bit_fields, fields_in_turn, nibble_halves, plane_groups, words_at
from bitgrain.numerics.block_types import BLOCK_TYPES
from bitgrain.numerics.plain_blocks import BITS, TWO_BITS
from bitgrain.weights import BlockFloatWeight, IntAffineWeight, SuperBlockWeight, Weight, WeightSpec

CODE_1, CODE_2, CODE_3, CODE_4, CODE_5, CODE_6, CODE_8, LEVELS_4, FLOAT_4 = range(9)
NO_SUB, UNSIGNED_SUB, SIGNED_SUB, NIBBLE_SUB, E8M0_SUB, E4M3_SUB = range(6)
NO_MINIMUM, ADDED_MINIMUM, SCALED_MINIMUM, ZERO_POINT, FLOAT_POINT = range(5)
MINIMUM_OF_ZERO = {"constant": NO_MINIMUM, "integer": ZERO_POINT, "float": FLOAT_POINT}
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CODE_OF_BITS = {1: CODE_2, 2: CODE_2, 3: CODE_3, 4: CODE_4, 5: CODE_5, 6: CODE_6, 7: CODE_8, 8: CODE_8}
# bit planes of a code: (width, lowest bit)
PLANES = {
    CODE_1: ((1, 0),), CODE_2: ((2, 0),), CODE_3: ((2, 0), (1, 2)), CODE_4: ((4, 0),), CODE_5: ((4, 0), (1, 4)), CODE_6: ((4, 0), (2, 4)),
    CODE_8: ((8, 0),), LEVELS_4: ((4, 0),), FLOAT_4: ((4, 0),),
}  # fmt: skip
NIBBLES = (0, 4)
RECORD = 256  # in features of one record of a panel


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The numbers of BlockFormat in native/include/block_kernels.hpp, except the scales' dtype.

    Args:
        group: in features of one sub-scale: 16 or 32.
        span:  in features of one scale of 16 or 32 bits; 0 where there is none.
    """

    code: int
    group: int
    span: int
    zero: int = 0
    sub: int = NO_SUB
    minimum: int = NO_MINIMUM

    def format(self, scale: torch.dtype) -> list[int]:
        """The seven integers that the library takes."""
        return [self.code, self.sub, self.minimum, SCALE_TYPES[scale], self.group, min(self.span, RECORD), self.zero]


@dataclass(frozen=True, slots=True)
class BlockParts:
    """The parts of some rows, each [N, one value per ...].

    Args:
        codes:      uint8, a dense stream of `bits` bits per in feature; the bits that are stored.
        scale:      16 or 32 bits, per span; None where there is none.
        minima:     dtype of scale, per span: what is added, or a zero point that is no byte.
        points:     uint8, per span.
        sub:        uint8, per group: the stored byte, whatever its kind.
        sub_minima: uint8, per group.
        factor:     float32 [N], applied to a whole row.
    """

    codes: Tensor
    scale: Tensor | None
    minima: Tensor | None = None
    points: Tensor | None = None
    sub: Tensor | None = None
    sub_minima: Tensor | None = None
    factor: Tensor | None = None
    bits: int = 8


# One per packed type: its layout, and the parts of blocks uint8 [B, bytes] as (codes, scale, minima, sub, sub_minima).
Fields = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _q4_1(blocks: Tensor) -> Fields:
    return nibble_halves(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2), None, None


def _q5_1(blocks: Tensor) -> Fields:
    codes = nibble_halves(blocks[:, 8:]) | fields_in_turn(blocks[:, 4:8], BITS, 1) << 4
    return codes, _half(blocks, 0), _half(blocks, 2), None, None


def _q1_0(blocks: Tensor) -> Fields:
    return fields_in_turn(blocks[:, 2:], BITS, 1), _half(blocks, 0), None, None, None


def _tq1_0(blocks: Tensor) -> Fields:
    from bitgrain.numerics.plain_blocks import decode_tq1_0

    unscaled = blocks.clone()
    unscaled[:, 52:54] = torch.ones(1, dtype=torch.float16).view(torch.uint8)
    return (decode_tq1_0(unscaled) + 1).to(torch.uint8), _half(blocks, 52), None, None, None


def _q2_k(blocks: Tensor) -> Fields:
    return plane_groups(blocks[:, 16:80], 32, TWO_BITS, 2), _half(blocks, 80), _half(blocks, 82), blocks[:, :16], None


def _q3_k(blocks: Tensor) -> Fields:
    stored = blocks[:, 96:108]
    scales = bit_fields(stored[:, :8], NIBBLES, 4).flatten(1) | bit_fields(stored[:, 8:], TWO_BITS, 2).flatten(1) << 4
    codes = plane_groups(blocks[:, 32:96], 32, TWO_BITS, 2) | plane_groups(blocks[:, :32], 32, BITS, 1) << 2
    return codes, _half(blocks, 108), None, scales - 32, None


def _scales_and_minima(stored: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [B, 8] each, six bits, of 12 bytes."""
    first, second, third = stored[:, :4], stored[:, 4:8], stored[:, 8:]
    return torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1), torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)


def _q4_k(blocks: Tensor) -> Fields:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    return plane_groups(blocks[:, 16:], 32, NIBBLES, 4), _half(blocks, 0), _half(blocks, 2), scales, minima


def _q5_k(blocks: Tensor) -> Fields:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    codes = plane_groups(blocks[:, 48:], 32, NIBBLES, 4) | plane_groups(blocks[:, 16:48], 32, BITS, 1) << 4
    return codes, _half(blocks, 0), _half(blocks, 2), scales, minima


def _q6_k(blocks: Tensor) -> Fields:
    codes = plane_groups(blocks[:, :128], 64, NIBBLES, 4) | plane_groups(blocks[:, 128:192], 32, TWO_BITS, 2) << 4
    return codes, _half(blocks, 208), None, blocks[:, 192:208], None


def _iq4_nl(blocks: Tensor) -> Fields:
    return nibble_halves(blocks[:, 2:]), _half(blocks, 0), None, None, None


def _iq4_xs(blocks: Tensor) -> Fields:
    high = fields_in_turn(words_at(blocks, 2, 1, 2), tuple(range(0, 16, 2)), 2).to(torch.uint8)
    scales = (fields_in_turn(blocks[:, 4:8], NIBBLES, 4) | high << 4) - 32
    return bit_fields(blocks[:, 8:].reshape(-1, 8, 16), NIBBLES, 4).flatten(1), _half(blocks, 0), None, scales, None


SUPER_LAYOUTS: dict[str, tuple[BlockLayout, Callable[[Tensor], Fields]]] = {
    "Q4_1": (BlockLayout(CODE_4, 32, 32, minimum=ADDED_MINIMUM), _q4_1),
    "Q5_1": (BlockLayout(CODE_5, 32, 32, minimum=ADDED_MINIMUM), _q5_1),
    "Q1_0": (BlockLayout(CODE_1, 32, 128, zero=1), _q1_0),
    "TQ1_0": (BlockLayout(CODE_2, 32, 256, zero=1), _tq1_0),
    "Q2_K": (BlockLayout(CODE_2, 16, 256, sub=NIBBLE_SUB, minimum=SCALED_MINIMUM), _q2_k),
    "Q3_K": (BlockLayout(CODE_3, 16, 256, zero=4, sub=SIGNED_SUB), _q3_k),
    "Q4_K": (BlockLayout(CODE_4, 32, 256, sub=UNSIGNED_SUB, minimum=SCALED_MINIMUM), _q4_k),
    "Q5_K": (BlockLayout(CODE_5, 32, 256, sub=UNSIGNED_SUB, minimum=SCALED_MINIMUM), _q5_k),
    "Q6_K": (BlockLayout(CODE_6, 16, 256, zero=32, sub=SIGNED_SUB), _q6_k),
    "IQ4_NL": (BlockLayout(LEVELS_4, 32, 32, zero=128), _iq4_nl),
    "IQ4_XS": (BlockLayout(LEVELS_4, 32, 256, zero=128, sub=SIGNED_SUB), _iq4_xs),
}


def layout_of(spec: WeightSpec) -> BlockLayout | str:
    """The layout of weights of a spec, or why there is none."""
    if spec.kind == "super_block":
        found = SUPER_LAYOUTS.get(spec.element.upper())
        return found[0] if found else f"decodes {', '.join(k.lower() for k in SUPER_LAYOUTS)} blocks, not {spec.element} ones"
    if spec.kind == "int_affine":
        size = spec.group_size or RECORD
        if size % 32 or spec.group_index or spec.row_index:
            return "takes integer rows or groups of a multiple of 32 along K, in order"
        if RECORD % size and size % RECORD:
            return f"keeps scales of records of {RECORD} in features, which groups of {size} do not divide"
        return BlockLayout(CODE_OF_BITS[spec.bits], 32, size, minimum=MINIMUM_OF_ZERO[spec.zero])
    if spec.kind == "block_float":
        if spec.element != "fp4_e2m1" or (spec.group_size, spec.scale_dtype) not in ((32, "e8m0"), (16, "e4m3")):
            return "takes four-bit floats in blocks of 32 with e8m0 or of 16 with e4m3 scales"
        if spec.second_scale == "group":
            return "takes a second scale per channel or tensor"
        return BlockLayout(FLOAT_4, spec.group_size, 0, zero=12, sub=E8M0_SUB if spec.group_size == 32 else E4M3_SUB)
    return f"takes weights in blocks, not {spec.kind} ones"


def split(weight: Weight) -> tuple[BlockLayout, BlockParts]:
    """A weight's layout and parts; layout_of(weight.spec) is one."""
    layout = layout_of(weight.spec)
    assert isinstance(layout, BlockLayout)  # the kernel refused the spec otherwise
    n = weight.shape[0]
    if isinstance(weight, SuperBlockWeight):
        blocks = weight.packed.reshape(-1, BLOCK_TYPES[weight.kind].nbytes)
        codes, scale, minima, sub, sub_minima = SUPER_LAYOUTS[weight.kind][1](blocks)
        least, small, small_least = (None if part is None else part.reshape(n, -1) for part in (minima, sub, sub_minima))
        return layout, BlockParts(codes.reshape(n, -1), scale.reshape(n, -1), minima=least, sub=small, sub_minima=small_least)
    if isinstance(weight, IntAffineWeight):
        return _split_integers(layout, weight)
    assert isinstance(weight, BlockFloatWeight)
    # the levels are doubled: exponents that can be are one less, and a factor halves otherwise
    if weight.second is None and weight.scale_type == "e8m0" and bool((weight.scale > 1).all()):
        return layout, BlockParts(weight.packed, None, sub=weight.scale - 1, bits=weight.bits)
    factor = torch.full((n,), 0.5) if weight.second is None else weight.second[:, 0].expand(n) * 0.5
    # a scale is never negative, so its sign bit is that of a zero at most
    return layout, BlockParts(weight.packed, None, sub=weight.scale if weight.scale_type == "e8m0" else weight.scale & 0x7F, factor=factor.contiguous(), bits=weight.bits)


def _split_integers(layout: BlockLayout, weight: IntAffineWeight) -> tuple[BlockLayout, BlockParts]:
    n = weight.shape[0]
    # a scale per row is one that all records share
    layout = replace(layout, span=layout.span if weight.spec.granularity == "group" else -(-weight.in_features // RECORD) * RECORD)
    parts = BlockParts(weight.packed, weight.scale.expand(n, -1), bits=weight.bits)
    if isinstance(weight.zero, int):
        return replace(layout, zero=weight.zero), parts
    zero = weight.zero.expand(n, -1)
    if layout.minimum == ZERO_POINT and not bool(((zero < 0) | (zero > 0xFF)).any()):
        return layout, replace(parts, points=zero.to(torch.uint8))
    # a zero point that is no byte (256 for codes of eight bits, fractions) is a number as wide as the scale, which widens where it must
    dtype = weight.scale.dtype if torch.equal(zero.to(weight.scale.dtype).float(), zero.float()) else torch.float32
    assert parts.scale is not None
    return replace(layout, minimum=FLOAT_POINT), replace(parts, scale=parts.scale.to(dtype), minima=zero.to(dtype))
