"""Eight-bit floating-point weights with a scale per tensor, channel or two-dimensional block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.weights.base import Weight, WeightSpec, check_range, covering_groups

if TYPE_CHECKING:
    from typing_extensions import Self

FLOAT8_NAMES = {
    torch.float8_e4m3fn: "fp8_e4m3fn",
    torch.float8_e4m3fnuz: "fp8_e4m3fnuz",
    torch.float8_e5m2: "fp8_e5m2",
}


def float_spec(dtype: torch.dtype, shape: tuple[int, int], cell: tuple[int, int]) -> WeightSpec:
    """The spec of a FloatWeight [N, K] of this element type whose scales each cover `cell` = (rows, columns)."""
    (n, k), (rows, columns) = shape, cell
    block = (0, 0)
    if rows >= n and columns >= k and not (rows == 1 and n == 1):
        granularity = "tensor"
    elif rows == 1 and columns >= k:
        granularity = "channel"
    else:
        granularity, block = "block", cell
    return WeightSpec("float", FLOAT8_NAMES[dtype], 8, granularity, block=block, scale_dtype="float32")


@dataclass(frozen=True, slots=True, eq=False)
class FloatWeight(Weight):
    """W[n, k] = float32(code[n, k]) * scale[n // rows, k // columns].

    Args:
        codes: float8_e4m3fn, float8_e4m3fnuz or float8_e5m2 [N, K], row-major.
        scale: float32 [ceil(N / block[0]), ceil(K / block[1])].
        block: (rows, columns) that share a scale: (N, K) per tensor, (1, K) per channel, e.g. (128, 128) per block;
               edge blocks may be short.
    """

    codes: Tensor
    scale: Tensor
    block: tuple[int, int]

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        rows, columns = self.block
        needed = (-(-n // rows), -(-k // columns))
        if self.codes.dtype not in FLOAT8_NAMES or tuple(self.scale.shape) != needed or self.scale.dtype != torch.float32:
            raise LayoutError(
                "FloatWeight",
                f"codes {self.codes.dtype} {[n, k]}, scale {self.scale.dtype} {list(self.scale.shape)}, block {self.block}",
                f"float8 codes and float32 scale {list(needed)}",
                "correct the format that made it",
            )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def spec(self) -> WeightSpec:
        return float_spec(self.codes.dtype, self.shape, self.block)

    def dequantize(self) -> Tensor:
        return self.codes.float().mul_(self._expanded(self.scale, self.shape[0]))

    def _expanded(self, scale: Tensor, rows: int) -> Tensor:
        """Scale of each element, [rows, K]; `scale` holds the block rows that cover them."""
        full = scale if scale.shape[0] in (1, rows) else torch.repeat_interleave(scale, self.block[0], dim=0)[:rows]
        if full.shape[1] > 1:
            full = torch.repeat_interleave(full, self.block[1], dim=1)[:, : self.shape[1]]
        return full

    def gather_rows(self, index: Tensor) -> Tensor:
        block_row = torch.div(index, self.block[0], rounding_mode="floor")
        return self.codes[index].float().mul_(self._expanded(self.scale[block_row], len(index)))

    def rows(self, start: int, stop: int) -> Self:
        check_range("rows of a FloatWeight", start, stop, self.shape[0])
        rows, columns = self.block
        group, size = covering_groups(rows, start, stop, self.scale.device)
        return replace(self, codes=self.codes[start:stop], scale=self.scale[group].contiguous(), block=(size, columns))

    def columns(self, start: int, stop: int) -> Self:
        check_range("columns of a FloatWeight", start, stop, self.shape[1])
        rows, columns = self.block
        group, size = covering_groups(columns, start, stop, self.scale.device)
        return replace(self, codes=self.codes[:, start:stop].contiguous(), scale=self.scale[:, group].contiguous(), block=(rows, size))

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        first = parts[0]
        for part in parts[1:]:
            same_columns = part.scale.shape[1] == first.scale.shape[1] and (part.block[1] == first.block[1] or part.scale.shape[1] == 1)
            if part.codes.dtype != first.codes.dtype or part.shape[1] != first.shape[1] or not same_columns:
                raise ShardError("concat of FloatWeights", "different types, widths or block columns", "equal ones", "run the parts side by side")
        aligned = all(p.block[0] == first.block[0] and p.shape[0] % p.block[0] == 0 for p in parts[:-1]) and parts[-1].block[0] == first.block[0]
        codes = torch.cat([p.codes.view(torch.uint8) for p in parts]).view(first.codes.dtype)
        if aligned:
            return cls(codes, torch.cat([p.scale for p in parts]), first.block)
        # parts that end inside a block, or whole-tensor scales: one scale per row keeps every value
        per_row = [torch.repeat_interleave(p.scale, p.block[0], dim=0)[: p.shape[0]] for p in parts]
        return cls(codes, torch.cat(per_row), (1, first.block[1]))

    def data_tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}
