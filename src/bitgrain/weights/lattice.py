"""Codes of eight columns that name points of the E8 lattice, with or without a second code for the residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.numerics.e8_lattice import DIMENSION, e8_ball, e8p_codebook
from bitgrain.weights.base import Weight, WeightSpec, check_range

if TYPE_CHECKING:
    from typing_extensions import Self

# Element types by the residual's type: bits per weight and name.
ELEMENTS = {None: (2, "e8p"), torch.uint8: (3, "e8p+e8"), torch.int16: (4, "e8p+e8p")}


def lattice_spec(bits: int) -> WeightSpec:
    """The spec of a LatticeWeight of 2, 3 or 4 bits per weight."""
    return WeightSpec("lattice", next(name for width, name in ELEMENTS.values() if width == bits), bits)


@dataclass(frozen=True, slots=True, eq=False)
class LatticeWeight(Weight):
    """W[n, 8 c : 8 c + 8] = e8p[codes[n, c]] (+ second[residual[n, c]] / residual_divisor), tables of numerics.e8_lattice.

    Args:
        codes:    int16 [N, K / 8], the 16 bits of an e8p code each: high byte magnitudes, low byte signs.
        residual: None; uint8 [N, K / 8], codes of the E8 ball; or int16 [N, K / 8], e8p codes.
        residual_divisor: what the residual's points are divided by.
    """

    codes: Tensor
    residual: Tensor | None = None
    residual_divisor: float = 1.0

    def __post_init__(self) -> None:
        second = self.residual
        wrong = self.codes.dtype != torch.int16 or self.codes.dim() != 2
        wrong |= second is not None and (second.dtype not in ELEMENTS or second.shape != self.codes.shape)
        if wrong or not self.residual_divisor > 0:
            shown = [f"{t.dtype} {list(t.shape)}" for t in (self.codes, second) if t is not None]
            raise LayoutError("LatticeWeight", f"{', '.join(shown)}, divisor {self.residual_divisor}", "the layout that the class documents", "correct the format that made it")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], DIMENSION * self.codes.shape[1])

    @property
    def spec(self) -> WeightSpec:
        return lattice_spec(ELEMENTS[None if self.residual is None else self.residual.dtype][0])

    def dequantize(self) -> Tensor:
        return self._values(self.codes, self.residual)

    def gather_rows(self, index: Tensor) -> Tensor:
        return self._values(self.codes[index], None if self.residual is None else self.residual[index])

    def _values(self, codes: Tensor, residual: Tensor | None) -> Tensor:
        values = _look_up(e8p_codebook(), codes)
        if residual is not None:
            table = e8_ball() if residual.dtype == torch.uint8 else e8p_codebook()
            values += _look_up(table / self.residual_divisor, residual)
        return values

    def rows(self, start: int, stop: int) -> Self:
        check_range("rows of a LatticeWeight", start, stop, self.shape[0])
        return self._cut(slice(start, stop), slice(None))

    def columns(self, start: int, stop: int) -> Self:
        check_range("columns of a LatticeWeight", start, stop, self.shape[1])
        if start % DIMENSION or stop % DIMENSION:
            raise ShardError("columns of a LatticeWeight", f"[{start}, {stop})", f"multiples of {DIMENSION}: a code stands for so many columns", "choose another parallel size")
        return self._cut(slice(None), slice(start // DIMENSION, stop // DIMENSION))

    def _cut(self, rows: slice, columns: slice) -> Self:
        residual = None if self.residual is None else self.residual[rows, columns]
        return replace(self, codes=self.codes[rows, columns], residual=residual)

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        first = parts[0]
        if len({(p.spec, p.shape[1], p.residual_divisor) for p in parts}) != 1:
            raise ShardError("concat of LatticeWeights", "different widths, lattices or divisors", "equal ones", "run the parts side by side")
        second = [p.residual for p in parts if p.residual is not None]
        return replace(first, codes=torch.cat([p.codes for p in parts]), residual=torch.cat(second) if second else None)

    def data_tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes} if self.residual is None else {"codes": self.codes, "residual": self.residual}


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """float32 [N, 8 C] of codes [N, C]."""
    index = codes.reshape(-1).to(torch.int32) & (table.shape[0] - 1)
    return table.to(codes.device).index_select(0, index).view(codes.shape[0], codes.shape[1] * table.shape[1])
