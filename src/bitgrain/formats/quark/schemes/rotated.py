"""Modules whose input is scaled and rotated before it is quantized; the matrix is stored beside the weight.

    y = inner(rotate(x * input_prescale))     rotate: x viewed [M, K / r, r] times R [r, r]
R is `input_rotation`: floats as they are (trained), or int8 +1 and -1 (Hadamard), then divided by sqrt(r).
Source: amd-quark 0.13 export/nn/modules/qparamslinear.py and algorithm/rotation/rotation_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError
from bitgrain.formats.around import SchemeAround
from bitgrain.formats.base import TensorRule
from bitgrain.formats.value_checks import require_finite, require_scale
from bitgrain.weights import ChannelScale, Kronecker, Transformed, Weight

ROTATION, PRESCALE = "input_rotation", "input_prescale"
TRANSFORM_NAMES = frozenset({ROTATION, PRESCALE})


@dataclass(frozen=True, slots=True)
class RotatedScheme(SchemeAround):
    """Another scheme behind input transforms.

    Args:
        size:     r; divides K.
        prescale: `input_prescale` [K] multiplies the input first.
    """

    size: int
    prescale: bool = False

    def tensors(self) -> tuple[TensorRule, ...]:
        rules = [TensorRule(ROTATION, ("I8", "F64", *FLOAT_CODES), ((self.size, self.size),))]
        if self.prescale:
            rules.append(TensorRule(PRESCALE, FLOAT_CODES, ((self.shape[1],),)))
        return (*self.inner.tensors(), *rules)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        inputs: list[ChannelScale | Kronecker] = []
        if self.prescale:
            inputs.append(ChannelScale(require_scale(PRESCALE, tensors[PRESCALE], signed=True).float()))
        inputs.append(Kronecker(None, self._matrix(tensors[ROTATION]), (self.shape[1] // self.size, self.size)))
        return Transformed(self.inner.to_weight(tensors), tuple(inputs))

    def _matrix(self, stored: Tensor) -> Tensor:
        """float32 [r, r].

        Raises:
            BadValueError: int8 entries other than 1 and -1, or floats that are not finite or all zero.
        """
        if stored.dtype != torch.int8:
            return require_scale(ROTATION, require_finite(ROTATION, stored), signed=True).float().contiguous()
        odd = int((stored.int().abs() != 1).sum())
        if odd:
            raise BadValueError(ROTATION, f"{odd} of {stored.numel()} entries are neither 1 nor -1", "a Hadamard matrix of both", "the file is damaged; fetch or write it again")
        return stored.float() / sqrt(self.size)
