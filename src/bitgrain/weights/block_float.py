"""Small floats in blocks along K that share a one-byte scale, with an optional second scale: the MX formats and NVFP4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.numerics.bitpack import dense_bytes, pack_dense, unpack_dense
from bitgrain.numerics.block_scales import SCALE_TYPES, decode_block_scale
from bitgrain.numerics.small_floats import SMALL_FLOATS, decode
from bitgrain.weights.base import Weight, WeightSpec, check_range, covering_groups, expand_columns

if TYPE_CHECKING:
    from typing_extensions import Self

ELEMENT_BITS = {"fp4_e0m3": 4, "fp4_e2m1": 4, "fp6_e2m3": 6, "fp6_e3m2": 6, "fp8_e4m3fn": 8, "fp8_e5m2": 8, "int8": 8}


def block_float_spec(element: str, block: int, scale_type: str, second: str = "none") -> WeightSpec:
    """The spec of a BlockFloatWeight.

    Args:
        second: what the second scale covers: "none", "tensor", "channel" or "group" (fewer columns than K).
    """
    return WeightSpec("block_float", element, ELEMENT_BITS[element], "group", block, scale_dtype=scale_type, second_scale=second)


@dataclass(frozen=True, slots=True, eq=False)
class BlockFloatWeight(Weight):
    """W[n, k] = element(code[n, k]) * (scale[n, k // block] * second[n, k // second_group]), scales decoded to float32.

    Args:
        packed:       uint8 [N, ceil(K * bits / 8)], a dense little-endian bit stream of codes per row: for 4 bits the even
                      element in the low nibble, for 6 bits four elements in three bytes.
        element:      a key of ELEMENT_BITS; "int8" is two's complement with six fractional bits.
        in_features:  K.
        scale:        uint8 [N, ceil(K / block)], codes of `scale_type`.
        scale_type:   "e8m0", "e4m3" or "e5m3".
        block:        columns per scale; the last block may be short.
        second:       float32 [1 or N, ceil(K / second_group)], or None for 1.
        second_group: columns per second scale; K where there is one per row or per tensor.
    """

    packed: Tensor
    element: str
    in_features: int
    scale: Tensor
    scale_type: str
    block: int
    second: Tensor | None = None
    second_group: int = 0

    def __post_init__(self) -> None:
        problem = self._layout_problem()
        if problem:
            raise LayoutError("BlockFloatWeight", problem, "the layout that the class documents", "correct the format that made it")

    def _layout_problem(self) -> str:
        n, k = self.shape
        if self.element not in ELEMENT_BITS or self.scale_type not in SCALE_TYPES:
            return f"element {self.element}, scale {self.scale_type}"
        if self.packed.dtype != torch.uint8 or tuple(self.packed.shape) != (n, dense_bytes(k, self.bits)):
            return f"codes {self.packed.dtype} {list(self.packed.shape)} for K = {k}, {self.bits} bits"
        if self.scale.dtype != torch.uint8 or tuple(self.scale.shape) != (n, -(-k // self.block)):
            return f"scale {self.scale.dtype} {list(self.scale.shape)} for [{n}, {k}] in blocks of {self.block}"
        if self.second is not None:
            columns = -(-k // self.second_group) if self.second_group else 0
            if self.second.dtype != torch.float32 or tuple(self.second.shape) not in ((1, columns), (n, columns)):
                return f"second scale {self.second.dtype} {list(self.second.shape)} for [{n}, {k}] in groups of {self.second_group}"
        return ""

    @classmethod
    def from_codes(
        cls, codes: Tensor, element: str, scale: Tensor, scale_type: str, block: int, second: Tensor | None = None, second_group: int = 0
    ) -> Self:
        """Pack codes uint8 [N, K]; the other arguments as in the class."""
        return cls(pack_dense(codes, ELEMENT_BITS[element]), element, codes.shape[1], scale, scale_type, block, second, second_group)

    @property
    def bits(self) -> int:
        return ELEMENT_BITS[self.element]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.packed.shape[0], self.in_features)

    @property
    def spec(self) -> WeightSpec:
        if self.second is None:
            second = "none"
        elif self.second.shape[1] > 1:
            second = "group"
        else:
            second = "channel" if self.second.shape[0] > 1 else "tensor"
        return block_float_spec(self.element, self.block, self.scale_type, second)

    def codes(self) -> Tensor:
        """uint8 [N, K]."""
        return unpack_dense(self.packed, self.bits, self.in_features)

    def scales(self) -> Tensor:
        """float32 [N, ceil(K / block)]: the decoded block scales, the second scale left out."""
        return decode_block_scale(self.scale, self.scale_type)

    def dequantize(self) -> Tensor:
        return self._values(self.packed, self.scale, self.second)

    def gather_rows(self, index: Tensor) -> Tensor:
        return self._values(self.packed[index], self.scale[index], self._second_rows(index))

    def _values(self, packed: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        k = self.in_features
        codes = unpack_dense(packed, self.bits, k)
        values = codes.view(torch.int8).float() / 64 if self.element == "int8" else decode(codes, SMALL_FLOATS[self.element])
        per_column = expand_columns(decode_block_scale(scale, self.scale_type), self.block, k)
        if second is not None:
            per_column = per_column * expand_columns(second, self.second_group, k)
        return values.mul_(per_column)

    def _second_rows(self, index: Tensor | slice) -> Tensor | None:
        if self.second is None or self.second.shape[0] != self.shape[0]:
            return self.second
        return self.second[index]

    def rows(self, start: int, stop: int) -> Self:
        check_range("rows of a BlockFloatWeight", start, stop, self.shape[0])
        part = slice(start, stop)
        return replace(self, packed=self.packed[part], scale=self.scale[part], second=self._second_rows(part))

    def columns(self, start: int, stop: int) -> Self:
        check_range("columns of a BlockFloatWeight", start, stop, self.in_features)
        packed = pack_dense(self.codes()[:, start:stop].contiguous(), self.bits)
        scale, block = _cut(self.scale, self.block, start, stop)
        width, second, group = stop - start, self.second, stop - start
        if second is not None and second.shape[1] > 1:
            second, group = _cut(second, self.second_group, start, stop)
        return replace(self, packed=packed, in_features=width, scale=scale, block=block, second=second, second_group=group if second is not None else 0)

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        first = parts[0]
        if len({(p.element, p.in_features, p.scale_type, p.block, p._second_columns()) for p in parts}) != 1:
            raise ShardError("concat of BlockFloatWeights", "different elements, widths, blocks or scale types", "equal ones", "run the parts side by side")
        second = None
        if any(p.second is not None for p in parts):
            # parts whose second scales differ keep them: one per row
            second = torch.cat([p._second_per_row() for p in parts])
        return replace(
            first,
            packed=torch.cat([p.packed for p in parts]),
            scale=torch.cat([p.scale for p in parts]),
            second=second,
            second_group=next((p.second_group for p in parts if p.second is not None), 0),
        )

    def _second_columns(self) -> int:
        return 1 if self.second is None else self.second.shape[1]

    def _second_per_row(self) -> Tensor:
        second = self.second if self.second is not None else torch.ones(1, 1, device=self.packed.device)
        return second.expand(self.shape[0], -1)

    def data_tensors(self) -> dict[str, Tensor]:
        held = {"packed": self.packed, "scale": self.scale}
        return held if self.second is None else {**held, "second": self.second}


def _cut(values: Tensor, size: int, start: int, stop: int) -> tuple[Tensor, int]:
    """(values of the columns [start, stop), columns per value)."""
    group, step = covering_groups(size, start, stop, values.device)
    return values[:, group].contiguous(), step
