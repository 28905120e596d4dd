"""What one module's tensors mean: packed blocks of the type that each tensor's own header names.

    integer codes and one float16 per block       IntAffineWeight      Q4_0 Q5_0 Q8_0 Q2_0 TQ2_0
    four-bit floats with a one-byte scale         BlockFloatWeight     MXFP4 NVFP4
    everything else, as it is stored              SuperBlockWeight
Source: formats specification, part 2, section 1.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError
from bitgrain.formats.base import DenseScheme, Scheme, TensorRule, scalar_shapes
from bitgrain.formats.value_checks import require_finite, static_value
from bitgrain.numerics.bitpack import pack_dense
from bitgrain.numerics.block_types import BLOCK_TYPES
from bitgrain.numerics.plain_blocks import INTEGER_BLOCKS, codes_mxfp4, codes_nvfp4
from bitgrain.numerics.super_blocks import SUPER_BLOCKS, block_scales, decode_blocks
from bitgrain.weights import (
    NO_ACTIVATION,
    ActivationSpec,
    BlockFloatWeight,
    DenseWeight,
    IntAffineWeight,
    SuperBlockWeight,
    Weight,
    WeightSpec,
)
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.super_block import super_block_spec

# type: columns per scale, and the type of a scale
FLOAT_BLOCKS = {"MXFP4": (32, "e8m0"), "NVFP4": (16, "e4m3")}
# type: codes of scales that canonical weights read otherwise or not at all
E8M0_LAST, E4M3_LAST = 0xFF, 0x7F


@dataclass(frozen=True, slots=True)
class BlockScheme(Scheme):
    """`weight`: rows of packed blocks [N, K]; `scale`: a factor for all of it, where one is stored.

    Args:
        kind:   the tensor's type, a key of numerics.block_types.
        scaled: a `scale` is stored beside it.
    """

    shape: tuple[int, int]
    kind: str
    scaled: bool = False
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def weight_spec(self) -> WeightSpec:
        layout, k = BLOCK_TYPES[self.kind], self.shape[1]
        if self.kind in FLOAT_BLOCKS:
            return block_float_spec("fp4_e2m1", *FLOAT_BLOCKS[self.kind], "tensor" if self.scaled else "none")
        if self.kind not in INTEGER_BLOCKS:
            return super_block_spec(self.kind)
        size = layout.elements if k > layout.elements else 0
        return WeightSpec("int_affine", f"uint{layout.bits}", layout.bits, "group" if size else "channel", size, zero="constant", scale_dtype="float16")

    @property
    def label(self) -> str:
        spec = self.weight_spec
        own = "" if spec.kind == "super_block" else f" ({self.kind.lower()})"
        return f"W{spec.bits}A{self.activation.bits} {spec.describe()}{own}"

    def tensors(self) -> tuple[TensorRule, ...]:
        rules = [TensorRule("weight", (self.kind,), (self.shape,))]
        if self.kind in FLOAT_BLOCKS:
            # the input's scale belongs to four-bit inputs, which the file leaves to whoever runs it
            rules += [TensorRule(name, ("F32",), scalar_shapes(), required=False) for name in ("scale", "input_scale")]
        return tuple(rules)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        packed = tensors["weight"]
        if self.kind in FLOAT_BLOCKS:
            return self._float_blocks(packed, tensors)
        # an all-zero block has a zero scale, and some writers have negative ones
        scales = require_finite("weight", block_scales(packed, self.kind))
        if self.kind not in INTEGER_BLOCKS:
            return SuperBlockWeight(packed, self.kind)
        decode, zero = INTEGER_BLOCKS[self.kind]
        n, k = self.shape
        layout = BLOCK_TYPES[self.kind]
        codes = decode(packed.reshape(-1, layout.nbytes)).reshape(n, k)
        return IntAffineWeight(pack_dense(codes, layout.bits), layout.bits, k, scales.half().view(n, -1), zero, min(layout.elements, k))

    def _float_blocks(self, packed: Tensor, tensors: Mapping[str, Tensor]) -> Weight:
        n, k = self.shape
        blocks = packed.reshape(-1, BLOCK_TYPES[self.kind].nbytes)
        block, scale_type = FLOAT_BLOCKS[self.kind]
        if self.kind == "MXFP4":
            codes, scale = codes_mxfp4(blocks), self._exponents(blocks[:, :1])
        else:
            codes, scale = codes_nvfp4(blocks), self._unsigned(blocks[:, :4])
        second = None
        if "input_scale" in tensors:
            self._factor("input_scale", tensors["input_scale"])
        if self.scaled:
            second = torch.tensor([[self._factor("scale", tensors["scale"])]], dtype=torch.float32)
        return BlockFloatWeight(pack_dense(codes.reshape(n, k), 4), "fp4_e2m1", k, scale.reshape(n, -1), scale_type, block, second, k if self.scaled else 0)

    @staticmethod
    def _exponents(codes: Tensor) -> Tensor:
        if bool((codes == E8M0_LAST).any()):
            found = f"{int((codes == E8M0_LAST).sum())} block exponents of 255: not a number to most programs, 2^128 to others"
            raise BadValueError("weight", found, "exponents of at most 254", "the file is damaged; fetch or write it again")
        return codes.contiguous()

    @staticmethod
    def _unsigned(codes: Tensor) -> Tensor:
        if bool((codes > E4M3_LAST).any()):
            found = f"{int((codes > E4M3_LAST).sum())} block scales with a sign, where scales are unsigned"
            raise BadValueError("weight", found, "codes of at most 127", "the file is damaged; fetch or write it again")
        # the last code is zero here, and not a number in canonical weights
        return torch.where(codes == E4M3_LAST, torch.zeros_like(codes), codes)

    @staticmethod
    def _factor(name: str, stored: Tensor) -> float:
        value = static_value(name, stored)
        if value <= 0:
            raise BadValueError(name, f"the value {value!r}", "a scale above zero", "the file is damaged; fetch or write it again")
        return value


@dataclass(frozen=True, slots=True)
class RouterScheme(DenseScheme):
    """A router's matrix, and the correction that is added to its scores before experts are chosen."""

    def tensors(self) -> tuple[TensorRule, ...]:
        correction = TensorRule("e_score_correction_bias", ("F32",), ((self.shape[0],),), required=False)
        return (TensorRule("weight", (self.dtype,), (self.shape,)), correction)


@dataclass(frozen=True, slots=True)
class LatentScheme(Scheme):
    """kv_b_proj [H (dn + dv), r] in two tensors, as absorbed attention wants them: `k_b` [H, r, dn] and `v_b` [H, dv, r].

    W rows of head h are k_b[h] transposed, then v_b[h].  k_b is packed along dn, so both are decoded to float32.

    Args:
        k_shape, v_shape: of the two tensors.
        k_kind, v_kind:   their types.
    """

    k_shape: tuple[int, int, int]
    v_shape: tuple[int, int, int]
    k_kind: str
    v_kind: str
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        heads, rank, nope = self.k_shape
        return (heads * (nope + self.v_shape[1]), rank)

    @property
    def weight_spec(self) -> WeightSpec:
        return WeightSpec("dense", "float32", 32)

    @property
    def label(self) -> str:
        return f"dense float32, from {self.k_kind.lower()} and {self.v_kind.lower()} per head"

    def tensors(self) -> tuple[TensorRule, ...]:
        return (TensorRule("k_b", (self.k_kind,), (self.k_shape,)), TensorRule("v_b", (self.v_kind,), (self.v_shape,)))

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        keys = _decoded("k_b", tensors["k_b"], self.k_kind).view(self.k_shape).transpose(1, 2)
        values = _decoded("v_b", tensors["v_b"], self.v_kind).view(self.v_shape)
        return DenseWeight(torch.cat((keys, values), dim=1).reshape(self.shape))


def _decoded(name: str, stored: Tensor, kind: str) -> Tensor:
    """float32 of a tensor of any type, its leading sizes flattened to rows."""
    rows = stored.reshape(-1, stored.shape[-1])
    if kind in FLOAT_CODES:
        return require_finite(name, rows).float()
    if kind in SUPER_BLOCKS:
        require_finite(name, block_scales(rows, kind))
        return decode_blocks(rows, kind)
    k = rows.shape[1] // BLOCK_TYPES[kind].nbytes * BLOCK_TYPES[kind].elements
    return BlockScheme((rows.shape[0], k), kind).to_weight({"weight": rows}).dequantize()
