"""Integer weights with a scale and an offset per channel or group of K: W[n, k] = (q[n, k] - offset[n, g]) * scale[n, g].

    plain    int8 [N, K], one code per byte, -8 ... 7 for four bits
    rows     int8 [N / 2, K], two rows per byte: row 2 n in the low nibble, 2 n + 1 in the high one
    columns  int8 [N, K / 2], two columns per byte: column 2 k in the low nibble
Nibbles are two's complement.  Two stages: the codes of the second stage give those of the first,
    W[n, k] = q[n, k] * scale_second[n, g] * scale[n]
Source: formats specification, part 2, section 2.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError
from bitgrain.formats.base import Scheme, TensorRule
from bitgrain.formats.grouped import int_affine_spec
from bitgrain.formats.stored_scales import checked_scale, grid_shapes, require_no_zero_point
from bitgrain.formats.value_checks import require_finite
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight, WeightSpec

LAYOUTS = ("plain", "rows", "columns")
OFFSET_CODES = (*FLOAT_CODES, "I8", "I16", "I32")
# Parts into which the producer cuts K for sums that a kernel takes back: at most so many ranks share a row.
SUM_PARTS = 16


def stored_shape(shape: tuple[int, int], layout: str) -> tuple[int, int]:
    """Shape of the stored codes of a matrix [N, K]."""
    n, k = shape
    return {"plain": (n, k), "rows": (n // 2, k), "columns": (n, k // 2)}[layout]


def unsigned_codes(stored: Tensor, bits: int, layout: str, name: str = "weight") -> Tensor:
    """uint8 [N, K]: stored codes plus 2**(bits - 1).

    Args:
        stored: int8, in `layout`.
    Raises:
        BadValueError: a plain code outside the width.
    """
    if bits == 8:
        return stored.contiguous().view(torch.uint8) ^ 0x80
    if layout == "plain":
        low, high = int(stored.min()), int(stored.max())
        if low < -8 or high > 7:
            raise BadValueError(name, f"codes from {low} to {high}", "codes from -8 to 7", "the description may name the wrong type; else fetch the file again")
        return (stored + 8).view(torch.uint8)
    raw = stored.contiguous().view(torch.uint8) ^ 0x88
    pair = torch.stack((raw & 0xF, raw >> 4), dim=1 if layout == "rows" else 2)
    return pair.flatten(0, 1) if layout == "rows" else pair.flatten(1, 2)


@dataclass(frozen=True, slots=True)
class IntScheme(Scheme):
    """`weight`, `weight_scale` and `weight_offset`.

    Args:
        bits:        8 or 4.
        layout:      one of LAYOUTS.
        group_size:  columns per scale; K for one scale per channel.
        zero:        "constant" (offsets are zeros, or absent), "integer" or "float".
        scale_dtype: element type of the stored scales, as safetensors spells it.
        two_stages:  `weight_scale_second` and `weight_offset_second` hold the groups, the others one number per channel.
        row_sums:    `scale_bias` may be stored: 8 times the sum of each row's weights, in parts.  It serves kernels that shift
                     nibbles to unsigned ones, and says nothing that the codes do not; it is not used.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    bits: int
    layout: str
    group_size: int
    zero: str = "constant"
    scale_dtype: str = "F32"
    two_stages: bool = False
    row_sums: bool = False

    @property
    def weight_spec(self) -> WeightSpec:
        return int_affine_spec(self.bits, self.shape[1], self.group_size, self.zero, "F32" if self.two_stages else self.scale_dtype)

    @property
    def grid(self) -> tuple[int, int]:
        """(N, number of groups)."""
        return self.shape[0], -(-self.shape[1] // self.group_size)

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        channels, groups = grid_shapes((n, 1)), grid_shapes(self.grid)
        first = channels if self.two_stages else groups
        rules = [
            TensorRule("weight", ("I8",), (stored_shape(self.shape, self.layout),)),
            TensorRule("weight_scale", FLOAT_CODES, first),
            TensorRule("weight_offset", OFFSET_CODES, first, required=self.zero != "constant"),
        ]
        if self.two_stages:
            rules += [TensorRule("weight_scale_second", FLOAT_CODES, groups), TensorRule("weight_offset_second", OFFSET_CODES, groups, required=False)]
        if self.row_sums:
            rules.append(TensorRule("scale_bias", FLOAT_CODES, ((n, 1), (n, SUM_PARTS), (n, k), (n,)), required=False))
        return tuple(rules)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes = unsigned_codes(tensors["weight"], self.bits, self.layout)
        centre = 1 << (self.bits - 1)
        scale = self._scale("weight_scale", tensors, codes, centre, (self.shape[0], 1) if self.two_stages else self.grid)
        if self.two_stages:
            scale = scale.float() * self._scale("weight_scale_second", tensors, codes, centre, self.grid).float()
            require_no_zero_point("weight_offset_second", tensors.get("weight_offset_second"))
        if "scale_bias" in tensors:
            require_finite("scale_bias", tensors["scale_bias"])
        return IntAffineWeight.from_codes(codes, self.bits, scale, self._zero(tensors, centre), self.group_size)

    def _scale(self, name: str, tensors: Mapping[str, Tensor], codes: Tensor, centre: int, grid: tuple[int, int]) -> Tensor:
        return checked_scale(name, tensors[name], codes, centre).reshape(grid).contiguous()

    def _zero(self, tensors: Mapping[str, Tensor], centre: int) -> int | Tensor:
        """The zero point among unsigned codes."""
        offset = tensors.get("weight_offset")
        if self.zero == "constant" or offset is None:
            require_no_zero_point("weight_offset", offset)
            return centre
        shifted = (require_finite("weight_offset", offset).float() + centre).reshape(self.grid).contiguous()
        return shifted.to(torch.int16) if self.zero == "integer" else shifted


def kind_of_offsets(offset: Tensor) -> str:
    """"constant", "integer" or "float": what WeightSpec.zero becomes for these offsets."""
    values = offset.float()
    if not bool((values != 0).any()):
        return "constant"
    whole = bool((values == values.round()).all()) and float(values.abs().max()) < 1 << 14
    return "integer" if whole else "float"
