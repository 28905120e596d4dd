"""What the tensors of one module mean: integer codes, eight-bit floats in blocks, and inputs that are scaled first.

Blocks of small floats are formats.block_float's; whole and per-channel eight-bit floats are those of every producer.
Source: formats specification, section 6; ModelOpt 0.47 export/quant_utils.py (pack_int4_in_uint8), quant_linear.py (SVDQuant).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError
from bitgrain.formats.base import Scheme, TensorRule, scalar_shapes
from bitgrain.formats.fp8.schemes import Float8Scheme
from bitgrain.formats.grouped import int_affine_spec
from bitgrain.formats.stored_scales import checked_scale, filled_activation, grid_of, grid_shapes, static_input_rules
from bitgrain.formats.value_checks import require_finite, require_scale
from bitgrain.weights import ActivationSpec, ChannelScale, IntAffineWeight, LowRank, Transformed, Weight, WeightSpec

DOWN, UP = "svdquant_lora_a", "svdquant_lora_b"


@dataclass(frozen=True, slots=True)
class BlockFloat8Scheme(Float8Scheme):
    """Eight-bit floats whose block scales keep the dimensions over which they were taken: [N / rows, 1, K / columns, 1]."""

    def tensors(self) -> tuple[TensorRule, ...]:
        rows, columns = grid_of(self.shape, self.cell)
        weight, scale, *rest = Float8Scheme.tensors(self)
        shapes = ((rows, 1, columns, 1), *grid_shapes((rows, columns)))
        return (weight, TensorRule(scale.name, scale.dtypes, shapes), *rest)


@dataclass(frozen=True, slots=True)
class IntegerScheme(Scheme):
    """W[n, k] = q[n, k] * weight_scale[n, g(k)] with signed codes and no zero point.

    8 bits: `weight` int8 [N, K].
    4 bits: `weight` uint8 [N / 2, K]; byte row r holds row 2r in the low nibble and row 2r + 1 in the high one, two's complement.
    `weight_scale` [N] or [N, ceil(K / group)].  `weight_scale_2` is the scale of the eight-bit float weight that some
    hardware makes of the codes on its way; W does not depend on it.

    Args:
        group:        columns per scale; K for one per row.
        second:       `weight_scale_2` is stored.
        scale_dtype:  element type of the scales as safetensors spells it.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    bits: int
    group: int
    second: bool = False
    scale_dtype: str = "F32"

    @property
    def weight_spec(self) -> WeightSpec:
        return int_affine_spec(self.bits, self.shape[1], self.group, "constant", self.scale_dtype)

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        codes = TensorRule("weight", ("I8",), (self.shape,)) if self.bits == 8 else TensorRule("weight", ("U8",), ((n // 2, k),))
        rules = [codes, TensorRule("weight_scale", FLOAT_CODES, grid_shapes(grid_of(self.shape, (1, self.group))))]
        if self.second:
            rules.append(TensorRule("weight_scale_2", FLOAT_CODES, scalar_shapes()))
        return (*rules, *static_input_rules(self.activation))

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """IntAffineWeight with unsigned codes q + 2**(bits-1); see Scheme.to_weight."""
        half = 1 << (self.bits - 1)
        stored = tensors["weight"].view(torch.uint8)
        # of two's complement, a flipped sign bit gives q + half
        codes = (stored if self.bits == 8 else torch.stack((stored & 0x0F, stored >> 4), 1).flatten(0, 1)) ^ half
        scale = checked_scale("weight_scale", tensors["weight_scale"], codes, half).reshape(grid_of(self.shape, (1, self.group)))
        if self.second:
            require_scale("weight_scale_2", tensors["weight_scale_2"])
        return IntAffineWeight.from_codes(codes, self.bits, scale.contiguous(), half, self.group)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return filled_activation(self.activation, dict(tensors))


@dataclass(frozen=True, slots=True)
class ScaledInputScheme(Scheme):
    """y = inner(x * pre_quant_scale) + lora_b (lora_a (x * pre_quant_scale)).

    `pre_quant_scale` [K], `svdquant_lora_a` [r, K], `svdquant_lora_b` [N, r], all of the model's dtype.

    Args:
        inner:  the scheme of the tensors beside them.
        scaled: a pre_quant_scale is, or must be, stored.
        rank:   r; 0: no low-rank correction.
        prefix: stands before the names of the low-rank factors.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    inner: Scheme
    scaled: bool = True
    rank: int = 0
    prefix: str = ""

    @property
    def weight_spec(self) -> WeightSpec:
        return self.inner.weight_spec

    @property
    def transforms_input(self) -> bool:
        return True

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        rules = list(self.inner.tensors())
        if self.scaled:
            rules.append(TensorRule("pre_quant_scale", FLOAT_CODES, ((k,), (1, k))))
        if self.rank:
            rules.append(TensorRule(self.prefix + DOWN, FLOAT_CODES, ((self.rank, k),)))
            rules.append(TensorRule(self.prefix + UP, FLOAT_CODES, ((n, self.rank),)))
        return tuple(rules)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        inner, low = self.inner.to_weight(tensors), None
        inputs: tuple[ChannelScale, ...] = ()
        if self.scaled:
            inputs = (ChannelScale(_positive("pre_quant_scale", tensors["pre_quant_scale"]).float().reshape(-1)),)
        if self.rank:
            down, up = self.prefix + DOWN, self.prefix + UP
            low = LowRank(require_finite(down, tensors[down]), require_finite(up, tensors[up]))
        return Transformed(inner, inputs, low)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return self.inner.to_activation(tensors)


def _positive(name: str, values: Tensor) -> Tensor:
    """`values` itself, finite and above zero everywhere; raises BadValueError else."""
    if not bool((require_finite(name, values) > 0).all()):
        bad = int((values <= 0).sum())
        raise BadValueError(
            name, f"{bad} of {values.numel()} values are not above zero", "factors above zero", "the file is damaged; write it again"
        )
    return values
