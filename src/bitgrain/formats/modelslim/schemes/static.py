"""int8 weights whose scale is stored multiplied by that of their static input, and whose bias is folded into an integer.

    xq  = clamp(round(x / input_scale + input_offset), -128, 127)
    y   = (xq Wq^T + quant_bias) * deq_scale             deq_scale = input_scale * weight_scale
    quant_bias = round(bias / deq_scale - input_offset * sum over k of Wq)
So W = Wq * (deq_scale / input_scale), and what a layer adds to x W^T is (quant_bias + input_offset * sum Wq) * deq_scale: the
stored `bias`, if there is one, rounded to steps of deq_scale.  It must not be added again.

`deq_scale` is float32, or int64 whose low 32 bits are those of a float32 (16-bit models other than bfloat16).
Source: formats specification, part 2, section 2.3; msmodelslim 26.1.0 AscendV1Saver (formulas).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError, LabelMismatchError
from bitgrain.formats.base import Scheme, TensorRule, scalar_shapes
from bitgrain.formats.grouped import int_affine_spec
from bitgrain.formats.modelslim.schemes.integers import OFFSET_CODES, unsigned_codes
from bitgrain.formats.stored_scales import checked_scale, grid_shapes, require_no_zero_point
from bitgrain.formats.value_checks import require_finite, static_value
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight, WeightSpec

# Relative distance of deq_scale from input_scale * weight_scale that rounding explains, bfloat16 scales included.
SCALE_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class StaticScheme(Scheme):
    """`weight` int8 [N, K], `deq_scale`, `quant_bias`, `input_scale`, `input_offset`; see the module.

    With `both` (W8A8_MIX) scales of the weight alone are stored too.  The producer means such a module to run with inputs
    quantized per token while a prompt is read, and statically while tokens are generated.  One process serves both phases
    here, so inputs are always quantized per token; the static values are checked against the others and not used.

    Args:
        both: `weight_scale` and `weight_offset` are required, and give the weight.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    both: bool = False

    @property
    def weight_spec(self) -> WeightSpec:
        return int_affine_spec(8, self.shape[1], self.shape[1], "constant", "F32")

    @property
    def holds_bias(self) -> bool:
        return True

    def tensors(self) -> tuple[TensorRule, ...]:
        n, _ = self.shape
        channels = grid_shapes((n, 1))
        return (
            TensorRule("weight", ("I8",), (self.shape,)),
            TensorRule("deq_scale", ("F32", "I64"), channels),
            TensorRule("quant_bias", ("I32",), channels),
            TensorRule("input_scale", FLOAT_CODES, scalar_shapes()),
            TensorRule("input_offset", OFFSET_CODES, scalar_shapes()),
            TensorRule("weight_scale", FLOAT_CODES, channels, required=self.both),
            TensorRule("weight_offset", OFFSET_CODES, channels, required=False),
        )

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes = unsigned_codes(tensors["weight"], 8, "plain")
        product = checked_scale("deq_scale", folded_scale(tensors["deq_scale"]), codes, 128).reshape(-1, 1)
        input_scale = self._input_scale(tensors)
        scale = product / input_scale
        if "weight_scale" in tensors:
            own = checked_scale("weight_scale", tensors["weight_scale"], codes, 128).float().reshape(-1, 1)
            self._check_agreement(product, own * input_scale)
            scale = own if self.both else scale
        require_no_zero_point("weight_offset", tensors.get("weight_offset"))
        return IntAffineWeight.from_codes(codes, 8, scale.contiguous(), 128, self.shape[1])

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        offset, scale = self._input_offset(tensors), self._input_scale(tensors)
        return self.activation if self.activation.dynamic else replace(self.activation, scale=scale, zero=offset)

    def to_bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """float32 [N]: what `quant_bias` adds beyond the correction of the input's offset."""
        product = folded_scale(tensors["deq_scale"]).reshape(-1)
        sums = tensors["weight"].sum(1, dtype=torch.int64)
        whole = tensors["quant_bias"].reshape(-1).long() + self._input_offset(tensors) * sums
        folded = (whole.double() * product.double()).float()
        stored = tensors.get("bias")
        if stored is None:
            return folded
        self._check_bias(require_finite("bias", stored).float(), folded, product, tensors["quant_bias"])
        return stored.float() if self.both else folded

    def _input_scale(self, tensors: Mapping[str, Tensor]) -> float:
        value = static_value("input_scale", tensors["input_scale"])
        if value <= 0:
            raise BadValueError("input_scale", f"the value {value!r}", "a scale above zero", "the file is damaged or was never calibrated; write it again")
        return value

    def _input_offset(self, tensors: Mapping[str, Tensor]) -> int:
        value = static_value("input_offset", tensors["input_offset"])
        if value != int(value) or not -128 <= value <= 127:
            raise BadValueError("input_offset", f"the value {value!r}", "a whole number from -128 to 127", "the file is damaged; write it again")
        return int(value)

    def _check_agreement(self, product: Tensor, made: Tensor) -> None:
        """Raise LabelMismatchError if deq_scale is not input_scale * weight_scale."""
        far = (product - made).abs() > SCALE_TOLERANCE * product.abs()
        if bool(far.any()):
            at = int(far.reshape(-1).nonzero()[0])
            raise LabelMismatchError(
                "deq_scale", f"{float(product[at]):g} for row {at}, but input_scale * weight_scale is {float(made[at]):g}", "equal values",
                "one of the three tensors is of another checkpoint; fetch or write it again",
            )  # fmt: skip

    def _check_bias(self, stored: Tensor, folded: Tensor, product: Tensor, quant_bias: Tensor) -> None:
        """Raise LabelMismatchError if the stored bias is not the folded one within a step, and float32 rounding of the sum."""
        steps = 1.0 + quant_bias.reshape(-1).abs().float() * 2.0**-21
        far = (stored - folded).abs() > steps * product.abs() + 1e-6 * stored.abs()
        if bool(far.any()):
            at = int(far.nonzero()[0])
            raise LabelMismatchError(
                "quant_bias", f"it stands for a bias of {float(folded[at]):g} in row {at}, but `bias` is {float(stored[at]):g}", "the same bias",
                "one of the two tensors is of another checkpoint; fetch or write it again",
            )  # fmt: skip


def folded_scale(stored: Tensor) -> Tensor:
    """float32 of `deq_scale` as stored, same shape.

    Raises:
        BadValueError: an int64 beyond 32 bits.
    """
    if stored.dtype != torch.int64:
        return stored.float()
    narrow = stored.to(torch.int32)
    if bool(((stored - narrow.long()) % (1 << 32) != 0).any()) or bool((stored >= 1 << 32).any()) or bool((stored < -(1 << 31)).any()):
        raise BadValueError("deq_scale", "integers beyond 32 bits", "the bits of float32 numbers", "the file is damaged; fetch or write it again")
    return narrow.view(torch.float32)
