"""Integer codes with a scale and a zero point per tensor, channel or group of K (or of N, by an index of rows)."""

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


@dataclass(frozen=True, slots=True, eq=False)
class IntAffineWeight(Weight):
    """W[n, k] = (code[n, k] - zero[r(n), g(k)]) * scale[r(n), g(k)]: integer subtraction, then one float32 multiply.

    Args:
        packed:      uint8 [N, ceil(K * bits / 8)], a dense little-endian bit stream of unsigned codes per row.
        bits:        1 to 8.
        in_features: K.
        scale:       bfloat16, float16 or float32 [N, G]; G = 1 for one scale per channel.  [1, 1] for one per tensor.
                     [S, G] with a row_index.
        zero:        an int for all (2**(bits-1) for symmetric codes), or int16 or float32 of the shape of `scale`.
        group_size:  columns per group; K when there is one group.  The last group may be short.
        group_index: int32 [K], the group of each column, or None for g(k) = k // group_size.
        row_index:   int32 [N], the row of `scale` and `zero` that each row uses, or None for r(n) = n.
    """

    packed: Tensor
    bits: int
    in_features: int
    scale: Tensor
    zero: int | Tensor
    group_size: int
    group_index: Tensor | None = None
    row_index: Tensor | None = None

    def __post_init__(self) -> None:
        problem = self._layout_problem()
        if problem:
            raise LayoutError("IntAffineWeight", problem, "the layout that the class documents", "correct the format that made it")

    def _layout_problem(self) -> str:
        n, k = self.shape
        if self.bits not in PLANES:
            return f"{self.bits} bits"
        if self.packed.dtype != torch.uint8 or tuple(self.packed.shape) != (n, dense_bytes(k, self.bits)):
            return f"codes {self.packed.dtype} {list(self.packed.shape)} for K = {k}, {self.bits} bits"
        if self.row_index is not None and tuple(self.row_index.shape) != (n,):
            return f"row_index {list(self.row_index.shape)} for N = {n}"
        if self.scale.dim() != 2 or (self.row_index is None and self.scale.shape[0] not in (1, n)):
            return f"scale {list(self.scale.shape)} for N = {n}"
        if self.group_index is None and self.scale.shape[1] != -(-k // self.group_size):
            return f"scale {list(self.scale.shape)} for K = {k} and groups of {self.group_size}"
        if self.group_index is not None and tuple(self.group_index.shape) != (k,):
            return f"group_index {list(self.group_index.shape)} for K = {k}"
        if isinstance(self.zero, Tensor) and (self.zero.shape != self.scale.shape or self.zero.dtype not in (torch.int16, torch.float32)):
            return f"zero {self.zero.dtype} {list(self.zero.shape)} for scale {list(self.scale.shape)}"
        return ""

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        bits: int,
        scale: Tensor,
        zero: int | Tensor,
        group_size: int,
        group_index: Tensor | None = None,
        row_index: Tensor | None = None,
    ) -> Self:
        """Pack unsigned codes uint8 [N, K]; the other arguments as in the class."""
        return cls(pack_dense(codes, bits), bits, codes.shape[1], scale, zero, group_size, group_index, row_index)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.packed.shape[0], self.in_features)

    @property
    def spec(self) -> WeightSpec:
        if self.scale.shape[1] > 1 or self.group_index is not None:
            granularity = "group"
        else:
            granularity = "channel" if self.scale.shape[0] == self.shape[0] or self.row_index is not None else "tensor"
        if isinstance(self.zero, Tensor):
            zero = "float" if self.zero.is_floating_point() else "integer"
        else:
            zero = "constant"
        return WeightSpec(
            "int_affine",
            f"uint{self.bits}",
            self.bits,
            granularity,
            self.group_size if granularity == "group" else 0,
            zero=zero,
            group_index=self.group_index is not None,
            scale_dtype=str(self.scale.dtype).removeprefix("torch."),
            row_index=self.row_index is not None,
        )

    def codes(self) -> Tensor:
        """uint8 [N, K], unsigned."""
        return unpack_dense(self.packed, self.bits, self.in_features)

    def dequantize(self) -> Tensor:
        return self._dequantize_codes(self.codes(), slice(None))

    def _dequantize_codes(self, codes: Tensor, rows: Tensor | slice) -> Tensor:
        values = codes.float()
        values -= self._per_column(self._row_values(self.zero, rows)) if isinstance(self.zero, Tensor) else float(self.zero)
        return values.mul_(self._per_column(self._row_values(self.scale, rows)))

    def _per_column(self, per_group: Tensor) -> Tensor:
        return expand_columns(per_group.float(), self.group_size, self.in_features, self.group_index)

    def _row_values(self, values: Tensor, rows: Tensor | slice) -> Tensor:
        """The scales or zero points of some rows; one row where all share it."""
        if self.row_index is not None:
            return values[self.row_index[rows].long()]
        return values[rows] if values.shape[0] == self.shape[0] else values

    def gather_rows(self, index: Tensor) -> Tensor:
        return self._dequantize_codes(unpack_dense(self.packed[index], self.bits, self.in_features), index)

    def rows(self, start: int, stop: int) -> Self:
        check_range("rows of an IntAffineWeight", start, stop, self.shape[0])
        part = slice(start, stop)
        if self.row_index is not None:
            return replace(self, packed=self.packed[part], row_index=self.row_index[part])
        zero = self._row_values(self.zero, part) if isinstance(self.zero, Tensor) else self.zero
        return replace(self, packed=self.packed[part], scale=self._row_values(self.scale, part), zero=zero)

    def columns(self, start: int, stop: int) -> Self:
        check_range("columns of an IntAffineWeight", start, stop, self.in_features)
        codes = self.codes()[:, start:stop].contiguous()
        packed = pack_dense(codes, self.bits)
        if self.group_index is not None:
            # act-order: a shard may need any group, so all scales stay and the index is cut
            return replace(self, packed=packed, in_features=stop - start, group_index=self.group_index[start:stop].contiguous())
        if self.scale.shape[1] == 1:
            return replace(self, packed=packed, in_features=stop - start, group_size=stop - start)
        return self._cut_groups(packed, start, stop)

    def _cut_groups(self, packed: Tensor, start: int, stop: int) -> Self:
        group, size = covering_groups(self.group_size, start, stop, self.scale.device)
        zero = self.zero[:, group].contiguous() if isinstance(self.zero, Tensor) else self.zero
        width = stop - start
        if len(group) == 1:
            size = width
        return replace(self, packed=packed, in_features=width, scale=self.scale[:, group].contiguous(), zero=zero, group_size=size)

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        first = parts[0]
        for part in parts[1:]:
            if (part.bits, part.in_features, part.group_size, part.scale.dtype) != (first.bits, first.in_features, first.group_size, first.scale.dtype):
                raise ShardError("concat of IntAffineWeights", "different widths, group sizes or scale dtypes", "equal ones", "run the parts side by side")
            if not _same_index(part.group_index, first.group_index):
                raise ShardError("concat of IntAffineWeights", "different group indices", "one index for all", "run the parts side by side")
        if any(p.row_index is not None for p in parts):
            return cls._concat_indexed(parts)
        zeros = [p.zero for p in parts]
        constant = all(isinstance(z, int) and z == first.zero for z in zeros)
        kinds = {z.dtype if isinstance(z, Tensor) else int for z in zeros}
        if not constant and len(kinds) > 1:
            raise ShardError("concat of IntAffineWeights", "different kinds of zero points", "equal ones", "run the parts side by side")
        return replace(
            first,
            packed=torch.cat([p.packed for p in parts]),
            scale=torch.cat([p._every_row(p.scale) for p in parts]),
            zero=first.zero if constant else torch.cat([p._every_row(p._zero_tensor()) for p in parts]),
        )

    @classmethod
    def _concat_indexed(cls, parts: Sequence[Self]) -> Self:
        """Stack parts whose rows look their scales up: the tables are stacked and the indices moved."""
        first = parts[0]
        if any(p.row_index is None or isinstance(p.zero, int) != isinstance(first.zero, int) for p in parts):
            raise ShardError("concat of IntAffineWeights", "row indices or zero points in some parts only", "equal kinds", "run the parts side by side")
        zeros = [p._zero_tensor() for p in parts]
        if len({z.dtype for z in zeros}) > 1:
            raise ShardError("concat of IntAffineWeights", "different kinds of zero points", "equal ones", "run the parts side by side")
        same = isinstance(first.zero, int) and all(p.zero == first.zero for p in parts)
        starts = [sum(p.scale.shape[0] for p in parts[:i]) for i in range(len(parts))]
        index = [p.row_index + start for p, start in zip(parts, starts, strict=True) if p.row_index is not None]
        return replace(
            first,
            packed=torch.cat([p.packed for p in parts]),
            scale=torch.cat([p.scale for p in parts]),
            zero=first.zero if same else torch.cat(zeros),
            row_index=torch.cat(index),
        )

    def _zero_tensor(self) -> Tensor:
        return self.zero if isinstance(self.zero, Tensor) else torch.full_like(self.scale, self.zero, dtype=torch.int16)

    def _every_row(self, values: Tensor) -> Tensor:
        return values.expand(self.shape[0], -1) if values.shape[0] == 1 else values

    def data_tensors(self) -> dict[str, Tensor]:
        held = {"packed": self.packed, "scale": self.scale}
        if isinstance(self.zero, Tensor):
            held["zero"] = self.zero
        if self.group_index is not None:
            held["group_index"] = self.group_index
        if self.row_index is not None:
            held["row_index"] = self.row_index
        return held


def _same_index(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
