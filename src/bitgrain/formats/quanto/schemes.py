"""What the tensors of a quanto module mean.

    qint8, qfloat8_*  weight._data [N, K], weight._scale [N, 1] (or [1, K], or one number)   W = data * scale
    qint2, qint4      weight._data._data uint8, weight._scale, weight._shift, of the grouped matrix [R, C]
                      float shift: W = q * scale - shift      integer shift: W = (q - shift) * scale
Grouped: [N, K] read as rows of `group` columns, [N K / group, group] with scales [R, 1]; along the last axis, [group, K N / group]
with scales [1, C], column k * (N / group) + a for rows a * group + i.  Packed along dimension 0: part i of the rows at bit
i * bits.  `input_scale` and `output_scale` are 1 where nothing was calibrated.
Source: formats specification, section 9; optimum-quanto 0.2.7 tensor/ (grouped, packed, qbits, qbytes) and nn/qmodule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TORCH_DTYPES
from bitgrain.errors import BadValueError, LabelMismatchError
from bitgrain.formats.base import DenseScheme, Scheme, TensorRule, scalar_shapes
from bitgrain.formats.shifted import without_zero_scales
from bitgrain.formats.stored_scales import checked_scale, grid_of, grid_shapes
from bitgrain.formats.value_checks import require_finite, static_value
from bitgrain.weights import ActivationSpec, FloatWeight, IntAffineWeight, Weight, WeightSpec
from bitgrain.weights.float8 import float_spec

DATA, PACKED, SCALE, SHIFT = "weight._data", "weight._data._data", "weight._scale", "weight._shift"
INPUT, OUTPUT = "input_scale", "output_scale"
FLOAT8_CODES = ("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2")
INTEGER_SHIFTS = ("U8", "I8")


def module_rules() -> tuple[TensorRule, ...]:
    """The scales of its input and output that every module of quanto has."""
    return tuple(TensorRule(name, FLOAT_CODES, scalar_shapes(), required=False) for name in (INPUT, OUTPUT))


def read_activation(activation: ActivationSpec, tensors: Mapping[str, Tensor]) -> ActivationSpec:
    """The static input quantization with its stored scale; the output is quantized where its scale is not 1.

    Raises:
        BadValueError: scales that are not above zero, or never were calibrated.
        LabelMismatchError: calibrated scales of a module whose activations are not quantized.
    """
    found = {name: static_value(name, tensors[name]) for name in (INPUT, OUTPUT) if name in tensors}
    for name, value in found.items():
        if value <= 0:
            raise BadValueError(name, f"the value {value!r}", "a scale above zero", "the file is damaged; fetch or write it again")
        if activation.is_none and value != 1:
            raise LabelMismatchError(
                name, f"the calibrated scale {value:g}", "1, because the activations of the module are called unquantized", "correct the quantization map"
            )
    if activation.is_none:
        return activation
    if found.get(INPUT, 1.0) == 1:
        raise BadValueError(
            INPUT, "the value 1, which says that no input was ever measured", "a calibrated scale", "calibrate the model, or save it without quantized activations"
        )
    output = found.get(OUTPUT, 1.0)
    return replace(activation, scale=found[INPUT], output=None if output == 1 else output)


@dataclass(frozen=True, slots=True)
class PlainScheme(DenseScheme):
    """A module that quanto wraps without quantizing its weight."""

    def tensors(self) -> tuple[TensorRule, ...]:
        return (*DenseScheme.tensors(self), *module_rules())

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return read_activation(self.activation, tensors)


@dataclass(frozen=True, slots=True)
class BytesScheme(Scheme):
    """qint8 and the float8 types.

    Args:
        dtype:       element type of the data, as safetensors spells it.
        cell:        (rows, columns) that share a scale.
        scale_dtype: as stored.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    dtype: str
    cell: tuple[int, int]
    scale_dtype: str

    @property
    def weight_spec(self) -> WeightSpec:
        (n, k), (rows, columns) = self.shape, self.cell
        if self.dtype != "I8":
            return float_spec(TORCH_DTYPES[self.dtype], self.shape, self.cell)
        granularity = "group" if columns < k else "channel" if rows < n or n == 1 else "tensor"
        scale_dtype = str(TORCH_DTYPES[self.scale_dtype]).removeprefix("torch.")
        return WeightSpec("int_affine", "uint8", 8, granularity, columns if columns < k else 0, zero="constant", scale_dtype=scale_dtype)

    def tensors(self) -> tuple[TensorRule, ...]:
        shapes = grid_shapes(grid_of(self.shape, self.cell))
        return TensorRule(DATA, (self.dtype,), (self.shape,)), TensorRule(SCALE, FLOAT_CODES, shapes), *module_rules()

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """IntAffineWeight of codes moved by 128, or FloatWeight."""
        data = tensors[DATA].contiguous()
        if self.dtype != "I8":
            require_finite(DATA, data.float())
        scale = checked_scale(SCALE, tensors[SCALE], data).reshape(grid_of(self.shape, self.cell)).contiguous()
        if self.dtype != "I8":
            return FloatWeight(data, scale.float(), self.cell)
        return IntAffineWeight.from_codes((data.to(torch.int16) + 128).to(torch.uint8), 8, scale, 128, min(self.cell[1], self.shape[1]))

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return read_activation(self.activation, tensors)


@dataclass(frozen=True, slots=True)
class BitsScheme(Scheme):
    """qint2 and qint4.

    Args:
        bits:        2 or 4.
        group:       elements per scale: of a row, or of a column where `along_rows`.
        scale_dtype: as stored.
        integer:     the shift is a code.
        along_rows:  groups run along N: quanto's axis -1.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    bits: int
    group: int
    scale_dtype: str
    integer: bool = False
    along_rows: bool = False

    @property
    def grouped(self) -> tuple[int, int]:
        """(rows, columns) of the matrix that is packed."""
        n, k = self.shape
        size = max(self.group, 1)
        return (size, n * k // size) if self.along_rows else (n * k // size, size)

    @property
    def weight_spec(self) -> WeightSpec:
        k = self.shape[1]
        size = 1 if self.along_rows else self.group
        scale_dtype = str(TORCH_DTYPES[self.scale_dtype]).removeprefix("torch.")
        return WeightSpec(
            "int_affine", f"uint{self.bits}", self.bits, "group" if size < k else "channel", size if size < k else 0,
            zero="integer" if self.integer else "float", scale_dtype=scale_dtype, row_index=self.along_rows,
        )  # fmt: skip

    def tensors(self) -> tuple[TensorRule, ...]:
        rows, columns = self.grouped
        scales = ((1, columns),) if self.along_rows else ((rows, 1),)
        packed = -(-rows * self.bits // 8)
        return (
            TensorRule(PACKED, ("U8",), ((packed, columns),)),
            TensorRule(SCALE, FLOAT_CODES, scales),
            TensorRule(SHIFT, INTEGER_SHIFTS if self.integer else FLOAT_CODES, scales),
            *module_rules(),
        )

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """IntAffineWeight; a float shift becomes the zero point shift / scale."""
        rows, _ = self.grouped
        parts = [tensors[PACKED] >> shift & ((1 << self.bits) - 1) for shift in range(0, 8, self.bits)]
        codes = self._as_matrix(torch.cat(parts)[:rows])
        stored = checked_scale(SCALE, tensors[SCALE], codes)
        scale, shift = self._table(stored), self._table(require_finite(SHIFT, tensors[SHIFT]))
        size = 1 if self.along_rows else self.group
        row_index = torch.arange(self.shape[0], dtype=torch.int32) // self.group if self.along_rows else None
        if self.integer:
            zero = shift.to(torch.int16)
        elif row_index is not None and bool((scale == 0).any()):
            raise BadValueError(SCALE, f"{int((scale == 0).sum())} scales are zero", "scales above zero", "the file is damaged; fetch or write it again")
        else:
            codes, scale, zero = without_zero_scales(codes, scale, -shift.float(), 0, size)
        return IntAffineWeight.from_codes(codes, self.bits, scale, zero, size, row_index=row_index)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return read_activation(self.activation, tensors)

    def _as_matrix(self, grouped: Tensor) -> Tensor:
        """uint8 [N, K] of the grouped codes."""
        n, k = self.shape
        if not self.along_rows:
            return grouped.reshape(n, k)
        return grouped.view(self.group, k, n // self.group).permute(2, 0, 1).reshape(n, k)

    def _table(self, values: Tensor) -> Tensor:
        """[N, G], or [N / group, K] where groups run along N, of one value per group."""
        n, k = self.shape
        if not self.along_rows:
            return values.reshape(n, k // self.group).contiguous()
        return values.reshape(k, n // self.group).t().contiguous()
