"""What the components of torchao's tensor subclasses mean.

    Int8Tensor, IntxUnpackedToInt8Tensor   W = (qdata - zero_point) * scale, one code per byte
    Int4Tensor                             W = qdata * scale + zero_point, two's complement nibbles, low one first
    Float8Tensor                           W = qdata * scale
    MXTensor, NVFP4Tensor                  W = qdata * (per_tensor_scale * scale), block scales perhaps tiled
`act_pre_scale` multiplies the input.  Source: torchao 0.18 (dequantize methods; for Int4Tensor prototype/gptq).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TORCH_DTYPES
from bitgrain.errors import BadValueError
from bitgrain.formats.base import Scheme, TensorRule, scalar_shapes
from bitgrain.formats.block_float import BlockFloatScheme
from bitgrain.formats.shifted import without_zero_scales
from bitgrain.formats.stored_scales import checked_scale, grid_of, grid_shapes, require_no_zero_point
from bitgrain.formats.torchao.experts import STORED_ROWS, TILE_ROWS
from bitgrain.formats.torchao.records import Record
from bitgrain.formats.value_checks import fill_static, require_finite, static_value
from bitgrain.numerics.bitpack import pack_dense
from bitgrain.weights import ActivationSpec, ChannelScale, FloatWeight, IntAffineWeight, Transformed, Weight, WeightSpec
from bitgrain.weights.float8 import float_spec

FLOAT8_CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ")
DAMAGED = "the file is damaged; fetch or write it again"


def local(component: str) -> str:
    """Local name of a component of a module's weight."""
    return f"_weight_{component}"


@dataclass(frozen=True, slots=True)
class RecordScheme(Scheme):
    """A parameter that a metadata record describes: what the classes share.

    Args:
        cell:        (rows, columns) that share a scale.
        scale_dtype: element type of the stored scales, as safetensors spells it.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    record: Record
    cell: tuple[int, int]
    scale_dtype: str = "F32"

    @property
    def transforms_input(self) -> bool:
        return "act_pre_scale" in self.record.components

    def has(self, component: str) -> bool:
        return component in self.record.components

    def input_rules(self) -> tuple[TensorRule, ...]:
        """The components that belong to the input."""
        k, scalar = self.shape[1], (*scalar_shapes(), (1, 1, 1))
        possible = (
            TensorRule(local("act_quant_scale"), FLOAT_CODES, scalar),
            TensorRule(local("act_quant_zero_point"), ("I8", "I32"), scalar),
            TensorRule(local("act_pre_scale"), FLOAT_CODES, ((k,), (1, k))),
        )
        return tuple(rule for rule in possible if self.has(rule.name.removeprefix("_weight_")))

    def scaled(self, weight: Weight, tensors: Mapping[str, Tensor]) -> Weight:
        """`weight` behind the scale of its input, if there is one."""
        name = local("act_pre_scale")
        if not self.transforms_input:
            return weight
        scale = require_finite(name, tensors[name]).float().reshape(-1)
        if bool((scale == 0).any()):
            raise BadValueError(name, f"{int((scale == 0).sum())} scales are zero", "factors that lose no channel", DAMAGED)
        return Transformed(weight, (ChannelScale(scale.contiguous()),))

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        if self.activation.is_none or self.activation.dynamic:
            return self.activation
        scale = static_value(local("act_quant_scale"), tensors[local("act_quant_scale")])
        if scale <= 0:
            raise BadValueError(local("act_quant_scale"), f"the value {scale!r}", "a scale above zero", DAMAGED)
        stored = tensors.get(local("act_quant_zero_point"))
        if self.activation.symmetric or stored is None:
            require_no_zero_point(local("act_quant_zero_point"), stored)
            return fill_static(self.activation, scale)
        return fill_static(self.activation, scale, int(static_value(local("act_quant_zero_point"), stored)))


@dataclass(frozen=True, slots=True)
class IntScheme(RecordScheme):
    """Int8Tensor and IntxUnpackedToInt8Tensor: one signed code per byte.

    Args:
        zero: see WeightSpec.zero; "constant" where the writer's settings say that stored zero points are zeros.
    """

    zero: str = "constant"

    @property
    def weight_spec(self) -> WeightSpec:
        (n, k), (rows, columns), bits = self.shape, self.cell, self.record.bits
        granularity = "group" if columns < k else "channel" if rows < n or n == 1 else "tensor"
        scale_dtype = str(TORCH_DTYPES[self.scale_dtype]).removeprefix("torch.")
        return WeightSpec("int_affine", f"uint{bits}", bits, granularity, columns if columns < k else 0, zero=self.zero, scale_dtype=scale_dtype)

    def tensors(self) -> tuple[TensorRule, ...]:
        shapes = grid_shapes(grid_of(self.shape, self.cell))
        rules = [TensorRule(local("qdata"), ("I8",), (self.shape,)), TensorRule(local("scale"), FLOAT_CODES, shapes)]
        if self.has("zero_point"):
            kinds = FLOAT_CODES if self.zero == "float" else ("I8", "I32")
            rules.append(TensorRule(local("zero_point"), kinds, shapes))
        return (*rules, *self.input_rules())

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """IntAffineWeight of codes moved by 2^(bits - 1)."""
        half, bits = 1 << (self.record.bits - 1), self.record.bits
        signed = tensors[local("qdata")]
        low, high = int(signed.min()), int(signed.max())
        if low < -half or high >= half:
            raise BadValueError(local("qdata"), f"codes from {low} to {high}", f"{bits}-bit codes, [{-half}, {half - 1}]", DAMAGED)
        scale = self._per_row(checked_scale(local("scale"), tensors[local("scale")], signed))
        zero = self._zero(tensors, half)
        codes = (signed.to(torch.int16) + half).to(torch.uint8)
        columns = min(self.cell[1], self.shape[1])
        return self.scaled(IntAffineWeight.from_codes(codes, bits, scale, zero, columns), tensors)

    def _zero(self, tensors: Mapping[str, Tensor], half: int) -> int | Tensor:
        name = local("zero_point")
        if self.zero == "constant":
            require_no_zero_point(name, tensors.get(name))
            return half
        stored = require_finite(name, tensors[name])
        if stored.is_floating_point():
            return self._per_row(stored.float() + half)
        low, high = int(stored.min()), int(stored.max())
        if low < -half or high >= half:
            raise BadValueError(name, f"values from {low} to {high}", f"zero points in [{-half}, {half - 1}]", DAMAGED)
        return self._per_row(stored.to(torch.int16) + half)

    def _per_row(self, values: Tensor) -> Tensor:
        """[1 or N, G] of one value per cell."""
        rows, columns = grid_of(self.shape, self.cell)
        table = values.reshape(rows, columns)
        if rows not in (1, self.shape[0]):
            table = torch.repeat_interleave(table, self.cell[0], dim=0)[: self.shape[0]]
        return table.contiguous()


@dataclass(frozen=True, slots=True)
class Int4Scheme(RecordScheme):
    """Int4Tensor: qdata [N, K / 2] bytes, scale and zero_point [G, N]; the zero point is what the code 0 stands for."""

    @property
    def weight_spec(self) -> WeightSpec:
        k, size = self.shape[1], self.cell[1]
        scale_dtype = str(TORCH_DTYPES[self.scale_dtype]).removeprefix("torch.")
        grouped = size < k
        return WeightSpec("int_affine", "uint4", 4, "group" if grouped else "channel", size if grouped else 0, zero="float", scale_dtype=scale_dtype)

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        table = ((grid_of(self.shape, self.cell)[1], n),)
        return (
            TensorRule(local("qdata"), ("I8", "U8"), ((n, k // 2),)),
            TensorRule(local("scale"), FLOAT_CODES, table),
            TensorRule(local("zero_point"), FLOAT_CODES, table),
            *self.input_rules(),
        )

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """IntAffineWeight: q * s + z = (c - (8 - z / s)) * s for c = q + 8, which is q with its sign bit turned over."""
        packed = tensors[local("qdata")].view(torch.uint8)
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(self.shape) ^ 8
        scale = checked_scale(local("scale"), tensors[local("scale")], codes, 8).t().contiguous()
        offset = require_finite(local("zero_point"), tensors[local("zero_point")]).float().t()
        size = min(self.cell[1], self.shape[1])
        codes, scale, zero = without_zero_scales(codes, scale, offset, 8, size)
        return self.scaled(IntAffineWeight.from_codes(codes, 4, scale, zero, size), tensors)


@dataclass(frozen=True, slots=True)
class Float8Scheme(RecordScheme):
    """Float8Tensor: float8 qdata [N, K] and a scale per cell.

    Args:
        dtype: element type of qdata, as safetensors spells it.
    """

    dtype: str = "F8_E4M3"

    @property
    def weight_spec(self) -> WeightSpec:
        return float_spec(TORCH_DTYPES[self.dtype], self.shape, self.cell)

    def tensors(self) -> tuple[TensorRule, ...]:
        shapes = grid_shapes(grid_of(self.shape, self.cell))
        return TensorRule(local("qdata"), (self.dtype,), (self.shape,)), TensorRule(local("scale"), FLOAT_CODES, shapes)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes = tensors[local("qdata")].contiguous()
        require_finite(local("qdata"), codes.float())
        scale = checked_scale(local("scale"), tensors[local("scale")], codes).float()
        return FloatWeight(codes, scale.reshape(grid_of(self.shape, self.cell)).contiguous(), self.cell)


@dataclass(frozen=True, slots=True)
class BlockScheme(BlockFloatScheme):
    """MXTensor and NVFP4Tensor.

    Args:
        swizzled: scales are stored in tiles of 128 rows and 4 blocks (see `unswizzled`).
    """

    swizzled: bool = False

    @property
    def _one_per_byte(self) -> bool:
        return self.element.startswith("fp6")

    def tensors(self) -> tuple[TensorRule, ...]:
        (n, k), blocks = self.shape, -(-self.shape[1] // self.block)
        codes, scale, *rest = BlockFloatScheme.tensors(self)
        if self._one_per_byte:
            codes = replace(codes, shapes=((n, k),))
        if self.swizzled:
            tiled = (STORED_ROWS * -(-n // TILE_ROWS), 16 * -(-blocks // 4))
            scale = replace(scale, shapes=(tiled, (tiled[0] * tiled[1],)))
        return (codes, scale, *rest)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        stored = dict(tensors)
        if self._one_per_byte:
            codes = stored[self.weight_name]
            if bool((codes >= 64).any()):
                raise BadValueError(self.weight_name, f"{int((codes >= 64).sum())} codes above 63", "6-bit codes", DAMAGED)
            stored[self.weight_name] = pack_dense(codes, 6)
        if self.swizzled:
            blocks = -(-self.shape[1] // self.block)
            stored[self.scale_name] = unswizzled(stored[self.scale_name].view(torch.uint8), self.shape[0], blocks)
        return BlockFloatScheme.to_weight(self, stored)


def unswizzled(stored: Tensor, rows: int, columns: int) -> Tensor:
    """uint8 [rows, columns], row-major, of block scales in the order in which tensor cores read them.

    Tiles of 128 x 4 follow each other row by row; inside one, the scale of row r and column c is byte
    16 (r % 32) + 4 (r // 32) + c.  Source: the layout of block scales in the documentation of cuBLAS.
    """
    high, wide = -(-rows // TILE_ROWS), -(-columns // 4)
    tiles = stored.reshape(high, wide, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(high * TILE_ROWS, wide * 4)[:rows, :columns].contiguous()
