"""One matrix of every expert of a layer, multiplied with rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitgrain.kernels.base import Prepared
from bitgrain.kernels.npu.antiquant_layout import columns, lay_out, scales_of
from bitgrain.kernels.npu.int8_matmul import scaled_sums
from bitgrain.kernels.npu.integer_input import Quantized, quantize, row_scales, signed_codes
from bitgrain.kernels.npu.weight_only import bias_for, rescaled
from bitgrain.weights import ActivationSpec, IntAffineWeight

# weights that one call takes as a list
LONGEST_LIST = 128


class Product(Protocol):
    def run(self, operators: Any, x: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """[R, N] of x's dtype.

        Args:
            x:      [R, K], sorted by expert.
            expert: int64 [R], of each row.
            ends:   int64 [experts], rows up to and with each expert's.
        """


def prepare_product(weight: IntAffineWeight, activation: ActivationSpec, operators: Any) -> Prepared:
    """One expert's matrix: as antiquant_layout.lay_out(), or signed codes [K, N], scale float32 [N] and their sums int32 [N].

    Raises:
        BadValueError: codes or zero points that the product cannot take.
    """
    if activation.is_none:
        return lay_out(weight, operators)
    codes = signed_codes(weight)
    tensors = {"weight": codes, "scale": row_scales(weight), "sums": codes.sum(0, dtype=torch.int32)}
    return Prepared(weight.shape, tensors, activation)


def grouped(operators: Any, x: Tensor, ends: Tensor, lists: dict[str, Sequence[Tensor] | None], output: torch.dtype) -> Tensor:
    """npu_grouped_matmul of all experts: in one call, or of as many experts as a list holds after another.

    Args:
        lists: the operator's lists, one tensor per expert, by argument name.
    """
    count = len(ends)

    def call(rows: Tensor, own: Tensor, part: slice) -> Tensor:
        named = {name: None if values is None else list(values[part]) for name, values in lists.items()}
        y: Tensor = operators.npu_grouped_matmul(
            [rows], group_list=own, split_item=3, group_type=0, group_list_type=0, output_dtype=output, **named
        )[0]
        return y

    if count <= LONGEST_LIST:
        return call(x, ends, slice(0, count))
    # where the rows of a piece begin must be known here: one wait for the device
    pieces, start = [], 0
    for first in range(0, count, LONGEST_LIST):
        part = slice(first, min(first + LONGEST_LIST, count))
        stop = int(ends[part.stop - 1])
        if stop > start:
            pieces.append(call(x[start:stop], ends[part] - start, part))
        start = stop
    return torch.cat(pieces)


class DecodedProduct:
    """16-bit inputs, integer weights that the operator decodes: (codes + offset) * scale."""

    def __init__(self, experts: Sequence[Prepared], biases: Sequence[Tensor] | None) -> None:
        self.experts, self.biases = experts, biases
        self.tables: dict[torch.dtype, _Table] = {}

    def run(self, operators: Any, x: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """See Product."""
        if x.dtype not in self.tables:
            self.tables[x.dtype] = self._table(x.dtype)
        table = self.tables[x.dtype]
        lists = {"weight": [e.tensors["weight"] for e in self.experts], "antiquant_scale": table.scales, "antiquant_offset": table.offsets}
        within = table.factors is None and table.biases is not None
        y = grouped(operators, columns(x, self.experts[0]), ends, {**lists, "bias": list(table.biases) if within and table.biases is not None else None}, x.dtype)
        if table.factors is not None:
            y = rescaled(y, table.factors[expert], None if table.biases is None else table.biases[expert])
        return y[:, : self.experts[0].shape[0]]

    def _table(self, dtype: torch.dtype) -> _Table:
        found = [scales_of(e, dtype) for e in self.experts]
        scales, offsets = [s.scale for s in found], [torch.zeros_like(s.scale) if s.offset is None else s.offset for s in found]
        width = scales[0].shape[1]
        if self.experts[0].meta["group"] == 0:
            scales, offsets = [s[0] for s in scales], [o[0] for o in offsets]
        factors = None
        if any(s.factor is not None for s in found):
            ones = torch.ones(width, device=scales[0].device)
            factors = torch.stack([ones if s.factor is None else s.factor for s in found])
        spare = width - self.experts[0].shape[0]
        biases = None if self.biases is None else torch.stack([pad(bias_for(dtype, bias), (0, spare)) for bias in self.biases])
        return _Table(scales, offsets, factors, biases)


@dataclass(slots=True)
class _Table:
    """What inputs of one dtype are multiplied with besides the codes: lists of experts' scales and offsets; factors and biases [experts, N']."""

    scales: list[Tensor]
    offsets: list[Tensor]
    factors: Tensor | None
    biases: Tensor | None


class IntegerProduct:
    """Integers on both sides: sums exact in int32, scaled in float32 by the scales of each row's expert."""

    def __init__(self, experts: Sequence[Prepared], biases: Sequence[Tensor] | None) -> None:
        self.activation = experts[0].activation
        self.weights = [e.tensors["weight"] for e in experts]
        self.scale = torch.stack([e.tensors["scale"] for e in experts])
        self.sums = None if self.activation.symmetric else torch.stack([e.tensors["sums"] for e in experts])
        self.biases = None if biases is None else torch.stack(list(biases))
        self.stored = None
        if not self.activation.dynamic:
            device = self.scale.device
            self.stored = torch.tensor([e.activation.scale for e in experts], dtype=torch.float32, device=device)
            self.zeros = torch.tensor([e.activation.zero for e in experts], dtype=torch.int32, device=device)

    def run(self, operators: Any, x: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """See Product."""
        inputs = self._inputs(operators, x, expert)
        total = grouped(operators, inputs.codes, ends, {"weight": self.weights}, torch.int32)
        sums = None if self.sums is None else self.sums[expert]
        return scaled_sums(total, inputs, self.scale[expert], sums, None if self.biases is None else self.biases[expert], x.dtype)

    def _inputs(self, operators: Any, x: Tensor, expert: Tensor) -> Quantized:
        if self.stored is None:
            return quantize(operators, self.activation, x, {})
        # each expert quantizes its rows with numbers of its own: codes of x / scale + zero
        scale, zero = self.stored[expert], self.zeros[expert][:, None]
        unit = replace(self.activation, scale=1.0, zero=0)
        if self.activation.symmetric:
            return Quantized(unit.quantize(x.float() / scale[:, None])[0], scale, None)
        return Quantized(unit.quantize(x.float() / scale[:, None] + zero)[0], scale, zero)
