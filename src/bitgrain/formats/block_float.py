"""Blocks of small floats as checkpoints store them, whatever the producer calls the tensors: MXFP4, MXFP6, MXFP8, MXINT8, NVFP4.

    W[n, k] = element(code) * block_scale[n, k // block] * second
The second scale is one number per module or absent; some producers store its reciprocal.  Activations may have a second
scale of their own, with the same two conventions.  Source: formats specification, sections 0.2, 4 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError, LabelMismatchError
from bitgrain.formats.base import Scheme, TensorRule, scalar_shapes
from bitgrain.formats.stored_scales import filled_activation, static_input_rules
from bitgrain.formats.value_checks import require_scale, static_value
from bitgrain.numerics.bitpack import dense_bytes
from bitgrain.numerics.block_scales import decode_block_scale
from bitgrain.numerics.small_floats import SMALL_FLOATS
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, BlockFloatWeight, Weight, WeightSpec
from bitgrain.weights.block_float import ELEMENT_BITS, block_float_spec

SCALE_CODES = {"e8m0": ("U8", "F8_E8M0"), "e4m3": ("F8_E4M3",), "e5m3": ("U8",)}
WHOLE_BYTE_CODES = {"fp8_e4m3fn": ("F8_E4M3",), "fp8_e5m2": ("F8_E5M2",), "int8": ("I8",)}
# Weights of a network stay far below it; a second scale that is read the wrong way round goes far beyond.
LARGEST_WEIGHT = 1e3


@dataclass(frozen=True, slots=True)
class BlockFloatScheme(Scheme):
    """Codes, block scales and perhaps a second scale.

    Args:
        element:        a key of weights.block_float.ELEMENT_BITS.
        block:          columns per scale.
        scale_type:     "e8m0", "e4m3" or "e5m3".
        weight_name:    codes: uint8 [N, ceil(K * bits / 8)], or one element per byte in its own type [N, K].
        scale_name:     one byte per block, [N, ceil(K / block)].
        second_name:    the second scale, one number; "" if there is none.
        second_divides: the stored second scale is a divisor.
        input_name:     static scale of the input, or second scale of a dynamic block-scaled input.
    """

    shape: tuple[int, int]
    element: str
    block: int
    scale_type: str
    activation: ActivationSpec = NO_ACTIVATION
    weight_name: str = "weight"
    scale_name: str = "weight_scale"
    second_name: str = ""
    second_divides: bool = False
    input_name: str = "input_scale"

    @property
    def weight_spec(self) -> WeightSpec:
        return block_float_spec(self.element, self.block, self.scale_type, "tensor" if self.second_name else "none")

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        codes = TensorRule(self.weight_name, ("U8",), ((n, dense_bytes(k, ELEMENT_BITS[self.element])),))
        if self.element in WHOLE_BYTE_CODES:
            codes = TensorRule(self.weight_name, (*WHOLE_BYTE_CODES[self.element], "U8"), ((n, k),))
        rules = [codes, TensorRule(self.scale_name, SCALE_CODES[self.scale_type], ((n, -(-k // self.block)),))]
        if self.second_name:
            rules.append(TensorRule(self.second_name, FLOAT_CODES, scalar_shapes()))
        if self._has_second_input:
            rules.append(TensorRule(self.input_name, FLOAT_CODES, scalar_shapes()))
        return (*rules, *static_input_rules(self.activation, self.input_name))

    @property
    def _has_second_input(self) -> bool:
        return self.activation.second_scale == "static"

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes, scale = tensors[self.weight_name].view(torch.uint8), tensors[self.scale_name].view(torch.uint8)
        self._check_codes(codes)
        values = require_scale(self.scale_name, decode_block_scale(scale, self.scale_type), codes_are_zero=not bool(codes.any()))
        second = None
        if self.second_name:
            factor = self._factor(self.second_name, tensors[self.second_name], self.second_divides)
            self._check_direction(float(values.max()), factor)
            second = torch.tensor([[factor]], dtype=torch.float32)
        return BlockFloatWeight(codes, self.element, self.shape[1], scale, self.scale_type, self.block, second, self.shape[1] if self.second_name else 0)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        if self._has_second_input:
            return replace(self.activation, second=self._factor(self.input_name, tensors[self.input_name], False))
        return filled_activation(self.activation, dict(tensors), self.input_name)

    def _check_codes(self, codes: Tensor) -> None:
        """Raise BadValueError where an element is NaN or infinite."""
        kind = SMALL_FLOATS.get(self.element)
        if kind is None or kind.storage is None:
            return
        magnitude = codes & 0x7F
        first_bad = 0x7F if kind.specials == "fn" else 0x7C
        if bool((magnitude >= first_bad).any()):
            bad = int((magnitude >= first_bad).sum())
            raise BadValueError(self.weight_name, f"{bad} of {codes.numel()} codes are NaN or infinite", "finite values", "the file is damaged; fetch or write it again")

    @staticmethod
    def _factor(name: str, stored: Tensor, divides: bool) -> float:
        """The stored number as a multiplier.

        Raises:
            BadValueError: it is not above zero.
        """
        value = static_value(name, stored)
        if value <= 0:
            raise BadValueError(name, f"the value {value!r}", "a scale above zero", "the file is damaged or was never calibrated; write it again")
        return 1.0 / value if divides else value

    def _check_direction(self, largest_block_scale: float, factor: float) -> None:
        """Raise LabelMismatchError if the second scale is plainly stored the other way round."""
        kind = SMALL_FLOATS.get(self.element)
        top = largest_block_scale * (kind.max if kind is not None else 127 / 64)
        if top * factor > LARGEST_WEIGHT and top / factor < LARGEST_WEIGHT:
            meant, other = ("divisor", "multiplier") if self.second_divides else ("multiplier", "divisor")
            raise LabelMismatchError(
                self.second_name,
                f"as a {meant} it gives weights up to {top * factor:g}, so it looks like a {other}",
                f"a {meant}, which this format stores",
                "correct the format that the configuration names, or write the checkpoint again",
            )
