"""Blocks of a matrix as sums of codebook entries, one entry of each codebook per block (additive quantization)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.weights.base import Weight, WeightSpec, check_range

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_CODE_BITS = 16
# Weights that are decoded at once: bounds the working set of dequantize().
CHUNK = 1 << 21


def additive_spec(codebooks: int, code_bits: int, block: tuple[int, int], scale_dtype: str) -> WeightSpec:
    """The spec of an AdditiveCodebookWeight: `codebooks` of 2**code_bits entries of block = (rows, columns) each.

    Its bits are those of the codes per weight, rounded, at least 1; `parse_additive` reads the element back.
    """
    h, g = block
    bits = max(1, round(codebooks * code_bits / (h * g)))
    return WeightSpec("additive", f"{codebooks}x{code_bits} blocks {h}x{g}", bits, scale_dtype=scale_dtype)


def parse_additive(element: str) -> tuple[int, int, tuple[int, int]]:
    """(codebooks, code_bits, block) of an additive_spec's element."""
    (books, bits), (h, g) = (word.split("x") for word in element.split(" blocks "))
    return int(books), int(bits), (int(h), int(g))


def code_dtype(code_bits: int) -> torch.dtype:
    """The integer type in which codes of so many bits are held."""
    return torch.int8 if code_bits <= 8 else torch.int16


@dataclass(frozen=True, slots=True, eq=False)
class AdditiveCodebookWeight(Weight):
    """W[h o + i, g k + j] = scale[o] * sum over c of codebooks[c, code[o, k, c], i, j].

    The sum runs from the first codebook to the last, in float32; then one multiply.

    Args:
        codes:     int8 (up to 8 bits) or int16 [N / h, K / g, C]; only the low `b` bits count, they are the unsigned code.
        codebooks: floating point [C, 2**b, h, g], b up to 16.
        scale:     floating point [N / h].
    """

    codes: Tensor
    codebooks: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        problem = self._layout_problem()
        if problem:
            raise LayoutError("AdditiveCodebookWeight", problem, "the layout that the class documents", "correct the format that made it")

    def _layout_problem(self) -> str:
        if self.codes.dim() != 3 or self.codebooks.dim() != 4:
            return f"codes {list(self.codes.shape)}, codebooks {list(self.codebooks.shape)}"
        books, entries = self.codebooks.shape[:2]
        if entries != 1 << self.code_bits or not 1 <= self.code_bits <= MAX_CODE_BITS or self.codes.shape[2] != books:
            return f"{books} codebooks of {entries} entries for codes {list(self.codes.shape)}"
        if self.codes.dtype != code_dtype(self.code_bits):
            return f"codes {self.codes.dtype} of {self.code_bits} bits"
        if tuple(self.scale.shape) != (self.codes.shape[0],):
            return f"scale {list(self.scale.shape)} for {self.codes.shape[0]} rows of blocks"
        return ""

    @property
    def code_bits(self) -> int:
        """Bits of a code (b)."""
        return self.codebooks.shape[1].bit_length() - 1

    @property
    def block(self) -> tuple[int, int]:
        """(h, g): rows and columns of a block."""
        return (self.codebooks.shape[2], self.codebooks.shape[3])

    @property
    def shape(self) -> tuple[int, int]:
        h, g = self.block
        return (h * self.codes.shape[0], g * self.codes.shape[1])

    @property
    def spec(self) -> WeightSpec:
        return additive_spec(self.codebooks.shape[0], self.code_bits, self.block, str(self.scale.dtype).removeprefix("torch."))

    def dequantize(self) -> Tensor:
        result = torch.empty(self.shape, device=self.codes.device)
        h, k = self.block[0], self.shape[1]
        step = max(1, CHUNK // (h * k))
        for first in range(0, self.codes.shape[0], step):
            blocks = self._blocks(self.codes[first : first + step], self.scale[first : first + step])
            result[h * first : h * (first + step)] = blocks.transpose(1, 2).reshape(-1, k)
        return result

    def _blocks(self, codes: Tensor, scale: Tensor) -> Tensor:
        """float32 [R, K / g, h, g] of codes [R, K / g, C]."""
        index = codes.to(torch.int32) & (self.codebooks.shape[1] - 1)
        total = self.codebooks[0].float()[index[:, :, 0]]
        for book in range(1, self.codebooks.shape[0]):
            total += self.codebooks[book].float()[index[:, :, book]]
        return total.mul_(scale.float()[:, None, None, None])

    def gather_rows(self, index: Tensor) -> Tensor:
        h = self.block[0]
        at = torch.div(index, h, rounding_mode="floor")
        blocks = self._blocks(self.codes[at], self.scale[at])
        return blocks[torch.arange(len(index), device=index.device), :, index % h].flatten(1)

    def rows(self, start: int, stop: int) -> Self:
        check_range("rows of an AdditiveCodebookWeight", start, stop, self.shape[0])
        part = self._whole_blocks("rows", start, stop, self.block[0])
        return replace(self, codes=self.codes[part], scale=self.scale[part])

    def columns(self, start: int, stop: int) -> Self:
        check_range("columns of an AdditiveCodebookWeight", start, stop, self.shape[1])
        return replace(self, codes=self.codes[:, self._whole_blocks("columns", start, stop, self.block[1])].contiguous())

    @staticmethod
    def _whole_blocks(what: str, start: int, stop: int, size: int) -> slice:
        if start % size or stop % size:
            raise ShardError(
                f"{what} of an AdditiveCodebookWeight",
                f"[{start}, {stop})",
                f"multiples of {size}: a code stands for so many",
                "choose another parallel size",
            )
        return slice(start // size, stop // size)

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        first = parts[0]
        same = len({(p.spec, p.shape[1]) for p in parts}) == 1 and all(torch.equal(p.codebooks, first.codebooks) for p in parts)
        if not same:
            raise ShardError(
                "concat of AdditiveCodebookWeights", "different widths, settings or codebooks", "equal ones", "run the parts side by side"
            )
        return replace(first, codes=torch.cat([p.codes for p in parts]), scale=torch.cat([p.scale for p in parts]))

    def data_tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "codebooks": self.codebooks, "scale": self.scale}
