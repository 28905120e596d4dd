"""Integer weights: codes, scales and the zero points that this format stores with them, in one stage or in two.

    W[n, k] = (q[n, k] - z) * s            one stage
    W[n, k] = (q[n, k] - z) * s2 * s       two stages: s is the scale of an eight-bit float that was quantized again
Per group, codes, scales and zero points are stored transposed: [K, N], [G, N], packed along N (int3: codes and zero
points are not).  Zero points are packed like codes; those of a symmetric scheme are stored all the same, and are zero.
Source: formats specification, part 2, section 3.2; amd-quark 0.13 export/nn/modules/realquantizer.py for shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TORCH_DTYPES
from bitgrain.formats.base import Scheme, TensorRule
from bitgrain.formats.quark.inputs import filled_input, input_rules
from bitgrain.formats.quark.schemes.packing import IntPacking
from bitgrain.formats.stored_scales import checked_scale, grid_of, grid_shapes, require_no_zero_point
from bitgrain.formats.value_checks import require_finite, require_scale
from bitgrain.numerics.bitpack import pack_dense
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight, WeightSpec


@dataclass(frozen=True, slots=True)
class QuarkIntScheme(Scheme):
    """`weight`, `weight_scale`, `weight_zero_point`; with a first stage the last two end in _2.

    Args:
        packing:     of codes and of packed zero points.
        cell:        (rows, columns) that share a scale: (N, K), (1, K) or (1, group).
        symmetric:   stored zero points are zero.
        float_zero:  zero points are not packed, one number per scale.
        scale_dtype: element type of the stored scales of the codes.
        first:       scales of the first stage: "" (there is none), "tensor" or "channel".
        grouped:     scales are per group, whatever the number of groups.
        plain_scale: scales per group are stored [N, G], as the oldest writers did.
        unsigned_input: the input's static zero point belongs to unsigned codes.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    packing: IntPacking
    cell: tuple[int, int]
    symmetric: bool = True
    float_zero: bool = False
    scale_dtype: str = "BF16"
    first: str = ""
    grouped: bool = False
    plain_scale: bool = False
    unsigned_input: bool = False

    @property
    def weight_spec(self) -> WeightSpec:
        rows, columns = self._grid
        n = self.shape[0]
        granularity = "group" if columns > 1 else "channel" if rows == n or self.first == "channel" else "tensor"
        return WeightSpec(
            "int_affine", f"uint{self.packing.bits}", self.packing.bits, granularity, self.cell[1] if columns > 1 else 0,
            zero="constant" if self._constant_zero else "float" if self.float_zero else "integer",
            scale_dtype="float32" if self.first else str(TORCH_DTYPES[self.scale_dtype]).removeprefix("torch."),
        )  # fmt: skip

    @property
    def _grid(self) -> tuple[int, int]:
        return grid_of(self.shape, self.cell)

    @property
    def _constant_zero(self) -> bool:
        # unsigned codes need their zero point whatever the label says
        return self.symmetric and self.packing.signed

    @property
    def _transposed(self) -> bool:
        return self.grouped and self.packing.dtype != "int3"

    def _name(self, local: str) -> str:
        return f"{local}_2" if self.first else local

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = (self.shape[1], self.shape[0]) if self._transposed else self.shape
        rows, groups = self._grid
        scales = ((groups, rows),) if self.grouped and not self.plain_scale else ((rows, groups),) if self.grouped else grid_shapes(self._grid)
        rules = [
            TensorRule("weight", self.packing.dtypes, ((n, self.packing.elements(k)),)),
            TensorRule(self._name("weight_scale"), FLOAT_CODES, scales),
        ]
        if self.first:
            rules.append(TensorRule("weight_scale", FLOAT_CODES, grid_shapes((1 if self.first == "tensor" else self.shape[0], 1))))
        # writers that work file by file leave the zero points of symmetric schemes out
        zero = self._name("weight_zero_point")
        rules.append(TensorRule(zero, self._zero_dtypes, self._zero_shapes(), required=not self._constant_zero))
        return (*rules, *input_rules(self.activation, self.unsigned_input))

    @property
    def _zero_dtypes(self) -> tuple[str, ...]:
        return (*FLOAT_CODES, "I32") if self.float_zero else self.packing.dtypes if self._packs_zero else (*self.packing.dtypes, "I32")

    @property
    def _packs_zero(self) -> bool:
        """A single number is never packed."""
        return not self.float_zero and self._grid != (1, 1)

    def _zero_shapes(self) -> tuple[tuple[int, ...], ...]:
        rows, groups = self._grid
        count = (lambda size: size) if self.float_zero else self.packing.elements
        if not self.grouped:
            return grid_shapes((count(rows), 1)) if self._packs_zero or self.float_zero else grid_shapes((1, 1))
        return ((groups, count(rows)),) if self._transposed or self.float_zero else ((rows, count(groups)),)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """IntAffineWeight of unsigned codes; see Scheme.to_weight."""
        n, k = self.shape
        stored = tensors["weight"]
        codes = self.packing.unpack("weight", stored, n).t().contiguous() if self._transposed else self.packing.unpack("weight", stored, k)
        name = self._name("weight_scale")
        scale = tensors[name].t() if self.grouped and not self.plain_scale else tensors[name].reshape(self._grid)
        if bool(scale.any()):
            require_scale(name, scale)
        else:
            checked_scale(name, scale, codes, self.packing.middle)
        scale = self._with_first(scale, tensors)
        group = self.cell[1] if self._grid[1] > 1 else k
        zero = self._zero(tensors)
        if isinstance(zero, Tensor):
            zero = zero.expand(scale.shape).contiguous()
        return IntAffineWeight(pack_dense(codes, self.packing.bits), self.packing.bits, k, scale.contiguous(), zero, group)

    def _with_first(self, scale: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scales of both stages together: float32, one product."""
        if not self.first:
            return scale
        first = require_scale("weight_scale", tensors["weight_scale"]).float().reshape(-1, 1)
        return scale.float() * first

    def _zero(self, tensors: Mapping[str, Tensor]) -> int | Tensor:
        """Zero points in the domain of unsigned codes: one int, or a tensor of the scales' shape."""
        name = self._name("weight_zero_point")
        stored = tensors.get(name)
        if self.float_zero:
            if self._constant_zero:
                require_no_zero_point(name, stored)
                return self.packing.middle
            assert stored is not None  # the header comparison required it
            values = require_finite(name, stored.float() if stored.is_floating_point() else stored).float() + self.packing.middle
            return values.t() if self.grouped else values.reshape(self._grid)
        codes = None if stored is None else self._zero_codes(name, stored)
        if self._constant_zero:
            require_no_zero_point(name, None if codes is None else codes.int() - self.packing.middle)
            return self.packing.middle
        assert codes is not None  # the header comparison required it
        return codes.to(torch.int16)

    def _zero_codes(self, name: str, stored: Tensor) -> Tensor:
        """Unsigned codes of the zero points, of the scales' grid; a single number is stored as it is."""
        rows, groups = self._grid
        if not self._packs_zero:
            return stored.reshape(1, 1).int() + self.packing.middle
        if not self.grouped:
            return self.packing.unpack(name, stored.reshape(1, -1), rows).t()
        if self._transposed:
            return self.packing.unpack(name, stored, rows).t()
        return self.packing.unpack(name, stored, groups)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return filled_input(self.activation, tensors, self.unsigned_input)
