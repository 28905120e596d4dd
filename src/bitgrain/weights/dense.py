"""Unquantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.weights.base import Weight, WeightSpec, check_range

if TYPE_CHECKING:
    from typing_extensions import Self

DENSE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeight(Weight):
    """A matrix as it is: W = data.

    Args:
        data: bfloat16, float16 or float32 [N, K], row-major.
    """

    data: Tensor

    def __post_init__(self) -> None:
        if self.data.dim() != 2 or self.data.dtype not in DENSE_DTYPES:
            raise LayoutError("DenseWeight", f"{self.data.dtype} {list(self.data.shape)}", "bfloat16, float16 or float32 [N, K]", "convert before")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.data.shape[0], self.data.shape[1])

    @property
    def spec(self) -> WeightSpec:
        return WeightSpec("dense", str(self.data.dtype).removeprefix("torch."), 8 * self.data.element_size())

    def dequantize(self) -> Tensor:
        return self.data.to(torch.float32, copy=True)

    def rows(self, start: int, stop: int) -> Self:
        check_range("rows of a DenseWeight", start, stop, self.shape[0])
        return type(self)(self.data[start:stop])

    def columns(self, start: int, stop: int) -> Self:
        check_range("columns of a DenseWeight", start, stop, self.shape[1])
        return type(self)(self.data[:, start:stop].contiguous())

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        if len({(p.data.dtype, p.shape[1]) for p in parts}) != 1:
            raise ShardError("concat of DenseWeights", "different dtypes or widths", "equal ones", "run the parts side by side")
        return cls(torch.cat([p.data for p in parts]))

    def data_tensors(self) -> dict[str, Tensor]:
        return {"data": self.data}

    def gather_rows(self, index: Tensor) -> Tensor:
        return self.data[index].float()
