"""Packed blocks kept as they are stored, for types whose values no other class holds exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.numerics.block_types import BLOCK_TYPES
from bitgrain.numerics.super_blocks import SUPER_BLOCKS, decode_blocks
from bitgrain.weights.base import Weight, WeightSpec, check_range

if TYPE_CHECKING:
    from typing_extensions import Self


def super_block_spec(kind: str) -> WeightSpec:
    """The spec of a SuperBlockWeight of a type; `group_size` is the type's elements per block."""
    layout = BLOCK_TYPES[kind]
    return WeightSpec("super_block", kind.lower(), layout.bits, "group", layout.elements, scale_dtype="float16")


@dataclass(frozen=True, slots=True, eq=False)
class SuperBlockWeight(Weight):
    """W[n] = the decoded blocks of row n, one after another along K (numerics.super_blocks says how each type decodes).

    Args:
        packed: uint8 [N, K / elements * bytes], the blocks of a row in order; elements and bytes by numerics.block_types.
        kind:   a key of numerics.super_blocks.SUPER_BLOCKS, such as "Q4_K".
    """

    packed: Tensor
    kind: str

    def __post_init__(self) -> None:
        problem = self._layout_problem()
        if problem:
            raise LayoutError("SuperBlockWeight", problem, "the layout that the class documents", "correct the format that made it")

    def _layout_problem(self) -> str:
        if self.kind not in SUPER_BLOCKS:
            return f"type {self.kind}"
        whole = self.packed.dim() == 2 and self.packed.shape[1] % BLOCK_TYPES[self.kind].nbytes == 0
        if self.packed.dtype != torch.uint8 or not whole:
            return f"blocks {self.packed.dtype} {list(self.packed.shape)} of {BLOCK_TYPES[self.kind].nbytes} bytes each"
        return ""

    @property
    def shape(self) -> tuple[int, int]:
        layout = BLOCK_TYPES[self.kind]
        return (self.packed.shape[0], self.packed.shape[1] // layout.nbytes * layout.elements)

    @property
    def spec(self) -> WeightSpec:
        return super_block_spec(self.kind)

    def dequantize(self) -> Tensor:
        return decode_blocks(self.packed, self.kind)

    def gather_rows(self, index: Tensor) -> Tensor:
        return decode_blocks(self.packed[index], self.kind)

    def rows(self, start: int, stop: int) -> Self:
        check_range("rows of a SuperBlockWeight", start, stop, self.shape[0])
        return replace(self, packed=self.packed[start:stop])

    def columns(self, start: int, stop: int) -> Self:
        """The weight of in features [start, stop); both are multiples of the type's block.

        Raises:
            ShardError: a cut inside a block, which no bytes can express.
        """
        check_range("columns of a SuperBlockWeight", start, stop, self.shape[1])
        layout = BLOCK_TYPES[self.kind]
        if start % layout.elements or stop % layout.elements:
            raise ShardError(
                f"columns of a {self.kind} weight",
                f"[{start}, {stop})",
                f"multiples of its block of {layout.elements}",
                "choose a parallel size that cuts between blocks, or dequantize the weight",
            )
        part = self.packed[:, layout.row_bytes(start) : layout.row_bytes(stop)]
        return replace(self, packed=part.contiguous())

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        if len({(p.kind, p.packed.shape[1]) for p in parts}) != 1:
            raise ShardError("concat of SuperBlockWeights", "different types or widths", "equal ones", "run the parts side by side")
        return replace(parts[0], packed=torch.cat([p.packed for p in parts]))

    def data_tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed}
