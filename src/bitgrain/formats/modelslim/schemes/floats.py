"""Small floats: e4m3 with a scale per channel, and MX blocks with a second scale or with one element per byte.

    float8  W[n, k] = weight[n, k] * weight_scale[n]
    mx      W[n, k] = element(weight[n, k]) * 2^(weight_scale[n, k // 32] - 127)     (formats.block_float)
    dual    ... * weight_dual_scale[n, k // B]
Source: formats specification, part 2, section 2.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError
from bitgrain.formats.base import Scheme, TensorRule
from bitgrain.formats.block_float import BlockFloatScheme
from bitgrain.formats.modelslim.schemes.integers import OFFSET_CODES
from bitgrain.formats.stored_scales import checked_scale, grid_shapes, require_no_zero_point
from bitgrain.formats.value_checks import require_scale
from bitgrain.numerics.bitpack import pack_dense
from bitgrain.numerics.small_floats import E2M1, decode, encode
from bitgrain.weights import ActivationSpec, BlockFloatWeight, FloatWeight, Weight, WeightSpec
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.float8 import float_spec


@dataclass(frozen=True, slots=True)
class ChannelFloat8Scheme(Scheme):
    """`weight` float8_e4m3fn [N, K], `weight_scale` [N, 1], `weight_offset` zeros."""

    shape: tuple[int, int]
    activation: ActivationSpec

    @property
    def weight_spec(self) -> WeightSpec:
        return float_spec(torch.float8_e4m3fn, self.shape, (1, self.shape[1]))

    def tensors(self) -> tuple[TensorRule, ...]:
        channels = grid_shapes((self.shape[0], 1))
        return (
            TensorRule("weight", ("F8_E4M3",), (self.shape,)),
            TensorRule("weight_scale", FLOAT_CODES, channels),
            TensorRule("weight_offset", OFFSET_CODES, channels, required=False),
        )

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes = tensors["weight"].contiguous()
        bad = (codes.view(torch.uint8) & 0x7F) == 0x7F
        if bool(bad.any()):
            raise BadValueError("weight", f"{int(bad.sum())} of {codes.numel()} values are NaN", "finite values", "the file is damaged; fetch it again")
        scale = checked_scale("weight_scale", tensors["weight_scale"], codes).float().reshape(-1, 1).contiguous()
        require_no_zero_point("weight_offset", tensors.get("weight_offset"))
        return FloatWeight(codes, scale, (1, self.shape[1]))


@dataclass(frozen=True, slots=True)
class MicroscalingScheme(BlockFloatScheme):
    """BlockFloatScheme with what this producer adds.

    Args:
        unpacked:     e2m1 values are stored one per byte, as float8_e4m3fn [N, K].
        second_group: columns per number of `weight_dual_scale` float32 [N, ceil(K / second_group), 1]; 0: there is none.
    """

    unpacked: bool = False
    second_group: int = 0

    @property
    def weight_spec(self) -> WeightSpec:
        second = ("group" if self.second_group < self.shape[1] else "channel") if self.second_group else "none"
        return block_float_spec(self.element, self.block, self.scale_type, second)

    def tensors(self) -> tuple[TensorRule, ...]:
        codes, *rest = BlockFloatScheme.tensors(self)
        if self.unpacked:
            codes = TensorRule("weight", ("F8_E4M3",), (self.shape,))
        if self.second_group:
            columns = -(-self.shape[1] // self.second_group)
            rest.append(TensorRule("weight_dual_scale", FLOAT_CODES, ((self.shape[0], columns, 1), (self.shape[0], columns))))
        return (codes, *rest)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        if self.unpacked:
            tensors = {**tensors, "weight": packed_e2m1(tensors["weight"])}
        weight = BlockFloatScheme.to_weight(self, tensors)
        if not self.second_group:
            return weight
        assert isinstance(weight, BlockFloatWeight)  # what a BlockFloatScheme makes
        second = require_scale("weight_dual_scale", tensors["weight_dual_scale"], codes_are_zero=not bool(weight.packed.any()))
        return replace(weight, second=second.float().reshape(self.shape[0], -1).contiguous(), second_group=min(self.second_group, self.shape[1]))


def packed_e2m1(values: Tensor) -> Tensor:
    """uint8 [N, ceil(K / 2)]: packed codes of float8 values that are all e2m1 numbers.

    Raises:
        BadValueError: some are not.
    """
    wide = values.float()
    codes = encode(wide.nan_to_num(nan=448.0), E2M1)
    wrong = decode(codes, E2M1) != wide
    if bool(wrong.any()):
        raise BadValueError("weight", f"{int(wrong.sum())} of {wide.numel()} values are no e2m1 number", "multiples of 0.5 up to 6, as e2m1 has them", "the description may name the wrong type; else fetch the file again")
    return pack_dense(codes, 4)
