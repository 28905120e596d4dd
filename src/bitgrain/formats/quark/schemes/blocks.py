"""Blocks of small floats in the storages that no other format has.

    float scales     codes as ever, `weight_scale` one float per group: W = element * scale
    joint blocks     "mx", oldest writers: `weight` holds 1 byte of scale and 16 or 24 bytes of elements per 32 columns
    split blocks     "mx", later writers: the same bytes, the scales in `weight_scale`
The scale byte of "mx" is the exponent itself, signed and without a bias: 2^e.  Its six-bit elements take three bytes per
four: a byte of the top two bits of each, then two bytes of the low four, the first element in the highest bits.
Source: formats specification, part 2, section 3.2; amd-quark 0.13 torch/utils/pack.py (Pack_mxfp4, Pack_mxfp6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError
from bitgrain.formats.base import Scheme, TensorRule
from bitgrain.formats.quark.inputs import filled_input, input_rules
from bitgrain.formats.stored_scales import checked_scale
from bitgrain.numerics.bitpack import dense_bytes
from bitgrain.weights import ActivationSpec, BlockFloatWeight, Weight, WeightSpec
from bitgrain.weights.block_float import ELEMENT_BITS, block_float_spec

MX_BLOCK = 32
# The E8M0 code of 1, and what is added to an exponent to make its code.
_BIAS = 127


@dataclass(frozen=True, slots=True)
class FloatScaleScheme(Scheme):
    """`weight` uint8 [N, ceil(K * bits / 8)], `weight_scale` a 16- or 32-bit float [N, ceil(K / group)].

    The canonical weight has block scales of 1 and the stored ones as its second scales, which is exact.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    element: str
    group: int

    @property
    def weight_spec(self) -> WeightSpec:
        return block_float_spec(self.element, self.group, "e8m0", "group" if self._groups > 1 else "channel")

    @property
    def _groups(self) -> int:
        return -(-self.shape[1] // self.group)

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        codes = TensorRule("weight", ("U8",), ((n, dense_bytes(k, ELEMENT_BITS[self.element])),))
        return (codes, TensorRule("weight_scale", FLOAT_CODES, ((n, self._groups),)), *input_rules(self.activation))

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes = tensors["weight"]
        scale = checked_scale("weight_scale", tensors["weight_scale"], codes).float().contiguous()
        ones = torch.full(scale.shape, _BIAS, dtype=torch.uint8)
        return BlockFloatWeight(codes, self.element, self.shape[1], ones, "e8m0", self.group, scale, self.group if self._groups > 1 else self.shape[1])

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return filled_input(self.activation, tensors)


@dataclass(frozen=True, slots=True)
class UnbiasedBlockScheme(Scheme):
    """dtype "mx": blocks of 32 columns whose exponents have no bias.

    Args:
        element: "fp4_e2m1", "fp6_e2m3" or "fp6_e3m2".
        joint:   scales lie inside `weight`, [N, K / 32 * (1 + block bytes)]; else they are `weight_scale` [N, K / 32].
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    element: str
    joint: bool

    @property
    def weight_spec(self) -> WeightSpec:
        return block_float_spec(self.element, MX_BLOCK, "e8m0")

    @property
    def _block_bytes(self) -> int:
        return MX_BLOCK * ELEMENT_BITS[self.element] // 8

    @property
    def _blocks(self) -> int:
        return self.shape[1] // MX_BLOCK

    def tensors(self) -> tuple[TensorRule, ...]:
        n, width = self.shape[0], self._block_bytes + int(self.joint)
        rules = [TensorRule("weight", ("U8",), ((n, self._blocks * width),))]
        if not self.joint:
            rules.append(TensorRule("weight_scale", ("U8", "I8"), ((n, self._blocks),)))
        return (*rules, *input_rules(self.activation))

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        n, k = self.shape
        stored = tensors["weight"].reshape(n, self._blocks, -1)
        exponents = stored[:, :, 0] if self.joint else tensors["weight_scale"].view(torch.uint8)
        elements = stored[:, :, 1:] if self.joint else stored
        if ELEMENT_BITS[self.element] == 6:
            elements = _repacked(elements.reshape(n, -1, 3))
        return BlockFloatWeight(elements.reshape(n, -1).contiguous(), self.element, k, self._codes(exponents), "e8m0", MX_BLOCK)

    def _codes(self, exponents: Tensor) -> Tensor:
        """E8M0 codes of signed exponents.

        Raises:
            BadValueError: -128, which no quantizer writes and E8M0 cannot hold.
        """
        signed = exponents.contiguous().view(torch.int8).int()
        if bool((signed < -_BIAS).any()):
            name = "weight" if self.joint else "weight_scale"
            found = f"{int((signed < -_BIAS).sum())} exponents of -128"
            raise BadValueError(name, found, f"exponents from -{_BIAS} to {_BIAS}", "the file is damaged; fetch or write it again")
        return (signed + _BIAS).to(torch.uint8)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return filled_input(self.activation, tensors)


def _repacked(stored: Tensor) -> Tensor:
    """uint8 [N, Q, 3], four codes each: from top and low parts, first element highest, to a stream with the first lowest."""
    top, first, last = (stored[:, :, i].int() for i in range(3))
    low = (first >> 4, first & 15, last >> 4, last & 15)
    word = torch.zeros_like(top)
    for place, part in enumerate(low):
        code = ((top >> (6 - 2 * place)) & 3) << 4 | part
        word |= code << (6 * place)
    return torch.stack([(word >> shift) & 0xFF for shift in (0, 8, 16)], dim=-1).to(torch.uint8)
