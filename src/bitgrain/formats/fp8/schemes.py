"""Eight-bit floating-point weights and their scales, as several producers store them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TORCH_DTYPES
from bitgrain.errors import BadValueError, LabelMismatchError
from bitgrain.formats.base import Scheme, TensorRule
from bitgrain.formats.stored_scales import (
    ZERO_CODES,
    checked_scale,
    decode_scale,
    filled_activation,
    grid_of,
    grid_shapes,
    require_no_zero_point,
    static_input_rules,
)
from bitgrain.formats.value_checks import require_finite
from bitgrain.weights import ActivationSpec, FloatWeight, Weight, WeightSpec
from bitgrain.weights.float8 import float_spec

FLOAT8_CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ")


@dataclass(frozen=True, slots=True)
class Float8Scheme(Scheme):
    """`weight` float8 [N, K] and one scale per cell: W = weight * scale, or weight / scale where `inverse`.

    Args:
        dtype:        element type of `weight`, as safetensors spells it.
        cell:         (rows, columns) that share a scale.
        scale_name:   "weight_scale" or "weight_scale_inv"; both are multipliers unless `inverse`.
        scale_dtypes: how the scale may be stored; uint8 and float8_e8m0fnu are powers of two.
        inverse:      the stored scale is a divisor.  The canonical multiplier 1 / scale is rounded once to float32, so
                      values may differ from the quotient by 1.2e-7 of themselves.
        weigh_direction: nothing but the absence of a marker says multiplier, so the values must not speak against it.
        input_scale:  name of the static input scale.
        zero_points:  the producer may store zero points though the scheme is symmetric; they must be zero.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    dtype: str
    cell: tuple[int, int]
    scale_name: str = "weight_scale"
    scale_dtypes: tuple[str, ...] = FLOAT_CODES
    inverse: bool = False
    weigh_direction: bool = False
    input_scale: str = "input_scale"
    zero_points: bool = False

    @property
    def weight_spec(self) -> WeightSpec:
        return float_spec(TORCH_DTYPES[self.dtype], self.shape, self.cell)

    def tensors(self) -> tuple[TensorRule, ...]:
        shapes = grid_shapes(grid_of(self.shape, self.cell))
        rules = [TensorRule("weight", (self.dtype,), (self.shape,)), TensorRule(self.scale_name, self.scale_dtypes, shapes)]
        if self.zero_points:
            rules.append(TensorRule("weight_zero_point", ZERO_CODES, shapes, required=False))
        return (*rules, *static_input_rules(self.activation, self.input_scale))

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """FloatWeight with a float32 scale per cell; see Scheme.to_weight."""
        codes = self._checked_codes(tensors["weight"])
        stored = decode_scale(tensors[self.scale_name])
        checked_scale(self.scale_name, stored, codes)
        require_no_zero_point("weight_zero_point", tensors.get("weight_zero_point"))
        self._check_direction(stored, codes)
        scale = stored
        if self.inverse:
            if bool((stored == 0).any()):
                raise BadValueError(
                    self.scale_name, "a divisor of zero", "divisors above zero", "the file is damaged; fetch or write it again"
                )
            scale = require_finite(self.scale_name, stored.reciprocal())
        return FloatWeight(codes, scale.reshape(grid_of(self.shape, self.cell)).contiguous(), self.cell)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return filled_activation(self.activation, dict(tensors), self.input_scale)

    def _checked_codes(self, codes: Tensor) -> Tensor:
        """`codes` itself; BadValueError if one of them is NaN or infinite."""
        bits = codes.contiguous().view(torch.uint8)
        if self.dtype == "F8_E4M3":
            bad = (bits & 0x7F) == 0x7F
        elif self.dtype == "F8_E5M2":
            bad = (bits & 0x7C) == 0x7C
        else:
            bad = bits == 0x80
        if bool(bad.any()):
            raise BadValueError(
                "weight",
                f"{int(bad.sum())} of {codes.numel()} values are NaN or infinite",
                "finite values",
                "the file is damaged; fetch it again",
            )
        return codes.contiguous()

    def _check_direction(self, stored: Tensor, codes: Tensor) -> None:
        """A quantizer maps a cell's largest weight to the type's maximum: a multiplier above one means weights beyond it."""
        if not (self.weigh_direction or self.inverse):
            return
        middle = float(stored.median())
        suspect = 0 < middle < 1 if self.inverse else middle > 1
        top = torch.finfo(codes.dtype).max
        if suspect and float(codes.float().abs().amax()) > 0.9 * top:
            meant = ("divisors", "multipliers") if self.inverse else ("multipliers", "divisors")
            raise LabelMismatchError(
                self.scale_name,
                f"the median scale is {middle:g} and codes reach {top:g}: as {meant[0]} they give weights beyond {top:g},"
                f" so they look like {meant[1]}",
                f"scales that are {meant[0]}, as the configuration says",
                'set weight_scale_semantics to "inverse" if the producer stores divisors, and remove it if it does not',
            )
