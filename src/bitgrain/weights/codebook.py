"""Codes that look their value up in a table, with a scale per group: four-bit lookup types such as NF4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.numerics.bitpack import PLANES, dense_bytes, pack_dense, unpack_dense
from bitgrain.weights.base import Weight, WeightSpec, check_range, covering_groups, expand_columns

if TYPE_CHECKING:
    from typing_extensions import Self


def codebook_spec(bits: int, group_size: int, scale_dtype: str = "float32") -> WeightSpec:
    """The spec of a CodebookWeight whose groups hold `group_size` columns; 0 for one scale per row."""
    granularity = "group" if group_size else "channel"
    return WeightSpec("codebook", f"lookup{bits}", bits, granularity, group_size, scale_dtype=scale_dtype)


@dataclass(frozen=True, slots=True, eq=False)
class CodebookWeight(Weight):
    """W[n, k] = table[code[n, k]] * scale[n, k // group_size].

    Args:
        packed:      uint8 [N, ceil(K * bits / 8)], a dense little-endian bit stream of codes per row.
        bits:        1 to 8.
        in_features: K.
        table:       float32 [1 or N, 2**bits]: one table for all rows, or one for each.
        scale:       bfloat16, float16 or float32 [N, ceil(K / group_size)].
        group_size:  columns per scale; K where there is one per row.
    """

    packed: Tensor
    bits: int
    in_features: int
    table: Tensor
    scale: Tensor
    group_size: int

    def __post_init__(self) -> None:
        problem = self._layout_problem()
        if problem:
            raise LayoutError("CodebookWeight", problem, "the layout that the class documents", "correct the format that made it")

    def _layout_problem(self) -> str:
        n, k = self.shape
        if self.bits not in PLANES:
            return f"{self.bits} bits"
        if self.packed.dtype != torch.uint8 or tuple(self.packed.shape) != (n, dense_bytes(k, self.bits)):
            return f"codes {self.packed.dtype} {list(self.packed.shape)} for K = {k}, {self.bits} bits"
        if self.table.dtype != torch.float32 or tuple(self.table.shape) not in ((1, 1 << self.bits), (n, 1 << self.bits)):
            return f"table {self.table.dtype} {list(self.table.shape)}"
        if tuple(self.scale.shape) != (n, -(-k // self.group_size)):
            return f"scale {list(self.scale.shape)} for [{n}, {k}] in groups of {self.group_size}"
        return ""

    @classmethod
    def from_codes(cls, codes: Tensor, bits: int, table: Tensor, scale: Tensor, group_size: int) -> Self:
        """Pack codes uint8 [N, K]; the other arguments as in the class."""
        return cls(pack_dense(codes, bits), bits, codes.shape[1], table, scale, group_size)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.packed.shape[0], self.in_features)

    @property
    def spec(self) -> WeightSpec:
        size = self.group_size if self.scale.shape[1] > 1 else 0
        return codebook_spec(self.bits, size, str(self.scale.dtype).removeprefix("torch."))

    def codes(self) -> Tensor:
        """uint8 [N, K]."""
        return unpack_dense(self.packed, self.bits, self.in_features)

    def dequantize(self) -> Tensor:
        return self._values(self.packed, self.table, self.scale)

    def gather_rows(self, index: Tensor) -> Tensor:
        return self._values(self.packed[index], self._table_rows(index), self.scale[index])

    def _values(self, packed: Tensor, table: Tensor, scale: Tensor) -> Tensor:
        codes = unpack_dense(packed, self.bits, self.in_features).long()
        values = table[0][codes] if table.shape[0] == 1 else torch.gather(table, 1, codes)
        return values.mul_(expand_columns(scale.float(), self.group_size, self.in_features))

    def _table_rows(self, index: Tensor | slice) -> Tensor:
        return self.table[index] if self.table.shape[0] == self.shape[0] and self.shape[0] > 1 else self.table

    def rows(self, start: int, stop: int) -> Self:
        check_range("rows of a CodebookWeight", start, stop, self.shape[0])
        part = slice(start, stop)
        return replace(self, packed=self.packed[part], table=self._table_rows(part), scale=self.scale[part])

    def columns(self, start: int, stop: int) -> Self:
        check_range("columns of a CodebookWeight", start, stop, self.in_features)
        packed, width = pack_dense(self.codes()[:, start:stop].contiguous(), self.bits), stop - start
        if self.scale.shape[1] == 1:
            return replace(self, packed=packed, in_features=width, group_size=width)
        group, size = covering_groups(self.group_size, start, stop, self.scale.device)
        return replace(self, packed=packed, in_features=width, scale=self.scale[:, group].contiguous(), group_size=width if len(group) == 1 else size)

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        first = parts[0]
        if len({(p.bits, p.in_features, p.group_size, p.scale.dtype) for p in parts}) != 1:
            raise ShardError("concat of CodebookWeights", "different widths, group sizes or scale dtypes", "equal ones", "run the parts side by side")
        table = first.table
        if table.shape[0] > 1 or any(not torch.equal(p.table, table) for p in parts):
            table = torch.cat([p.table.expand(p.shape[0], -1) for p in parts])
        return replace(first, packed=torch.cat([p.packed for p in parts]), table=table, scale=torch.cat([p.scale for p in parts]))

    def data_tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "table": self.table, "scale": self.scale}
