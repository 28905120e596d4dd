"""What every canonical weight offers, and the small description by which kernels are chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import ShardError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """The facts about a weight that decide which kernel can run it; no data, hashable.

    Args:
        kind:        "dense", "int_affine", "float", "block_float", "codebook", "super_block", "lattice", "trellis", "additive" or
                     "vector_codebook".
        element:     element type: "bfloat16", "uint4", "fp8_e4m3fn", ...
        granularity: "none", "tensor", "channel", "group" (1-D along K) or "block" (2-D).
        group_size:  elements of K per scale for "group", else 0.
        block:       (rows, columns) per scale for "block", else (0, 0).
        zero:        "none", "constant" (one integer for all), "integer" or "float" (one per scale).
        group_index: the group of a column is looked up instead of computed (activation order).
        scale_dtype: dtype name of the stored scales, or their one-byte type ("e8m0", "e4m3", "e5m3"); "" if there are none.
        row_index:   the row of scales that a row uses is looked up (groups that run along N).
        second_scale: what a second scale covers: "none", "tensor", "channel" or "group".
    """

    kind: str
    element: str
    bits: int
    granularity: str = "none"
    group_size: int = 0
    block: tuple[int, int] = (0, 0)
    zero: str = "none"
    group_index: bool = False
    scale_dtype: str = ""
    row_index: bool = False
    second_scale: str = "none"

    def stacked(self, rows: tuple[int, ...]) -> WeightSpec:
        """The spec of several such weights of these heights stacked along N (see Weight.concat)."""
        if len(rows) > 1 and self.granularity == "tensor":
            return replace(self, granularity="channel")
        if len(rows) > 1 and self.second_scale == "tensor":
            return replace(self, second_scale="channel")
        if self.granularity == "block" and any(n % self.block[0] for n in rows[:-1]):
            return replace(self, block=(1, self.block[1]))
        return self

    def describe(self) -> str:
        """Short text such as "int4 g128 asym" or "fp8_e4m3fn block 128x128"."""
        if self.kind in ("dense", "super_block"):
            return self.element
        parts = [f"int{self.bits}" if self.kind == "int_affine" else self.element]
        if self.granularity == "group":
            parts.append(f"g{self.group_size}")
        elif self.granularity == "block":
            parts.append(f"block {self.block[0]}x{self.block[1]}")
        elif self.granularity != "none":
            parts.append(self.granularity)
        if self.zero in ("integer", "float"):
            parts.append("asym")
        if self.group_index:
            parts.append("act-order")
        if self.row_index:
            parts.append("along N")
        if self.kind == "block_float":
            parts.append(self.scale_dtype if self.second_scale == "none" else f"{self.scale_dtype} x {self.second_scale}")
        return " ".join(parts)


class Weight(ABC):
    """One weight matrix [N, K]; frozen: every operation returns a new weight."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    @abstractmethod
    def spec(self) -> WeightSpec:
        """The description that kernels are chosen by."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """float32 [N, K]: what the numbers mean; a new tensor."""

    def effective(self) -> Tensor:
        """float32 [N, K]: W in y = x W^T, with the transforms that belong to the weight; a new tensor."""
        return self.dequantize()

    @abstractmethod
    def rows(self, start: int, stop: int) -> Self:
        """The weight of out features [start, stop); exact."""

    @abstractmethod
    def columns(self, start: int, stop: int) -> Self:
        """The weight of in features [start, stop); exact."""

    @classmethod
    @abstractmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Stack weights along N; exact, or ShardError when the parts cannot be one weight."""

    @abstractmethod
    def data_tensors(self) -> dict[str, Tensor]:
        """The tensors that hold the weight, by field name."""

    @abstractmethod
    def gather_rows(self, index: Tensor) -> Tensor:
        """float32 [len(index), K]: rows of dequantize() without making the rest of it."""

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The weight with `change` applied to each of its tensors (a copy, a move to a device)."""
        return replace(self, **{name: change(tensor) for name, tensor in self.data_tensors().items()})  # type: ignore[type-var]

    def shard(self, dim: int, rank: int, count: int) -> Self:
        """Part `rank` of `count` equal parts along N (dim 0) or K (dim 1).

        Raises:
            ShardError: the size does not divide, or rank is outside [0, count).
        """
        size = self.shape[dim]
        if count < 1 or size % count or not 0 <= rank < count:
            raise ShardError(
                f"shard {rank} of {count} along {'NK'[dim]}",
                f"size {size}",
                f"a multiple of {count} and a rank below it",
                "choose a parallel size that divides the dimension",
            )
        part = size // count
        cut = self.rows if dim == 0 else self.columns
        return cut(rank * part, (rank + 1) * part)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that hold the weight, scales and zero points included."""
        return sum(t.numel() * t.element_size() for t in self.data_tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per element of the matrix, scales and zero points included."""
        n, k = self.shape
        return 8.0 * self.nbytes / (n * k)


def check_range(what: str, start: int, stop: int, size: int) -> None:
    """Raise ShardError unless 0 <= start < stop <= size."""
    if not 0 <= start < stop <= size:
        raise ShardError(what, f"[{start}, {stop})", f"a non-empty range inside [0, {size})", "correct the range")


def covering_groups(size: int, start: int, stop: int, device: torch.device) -> tuple[Tensor, int]:
    """(int64 group of each piece, piece size) that cover [start, stop) where `size` elements share a value.

    A cut inside a group is exact with smaller pieces that repeat the group's value.
    """
    piece = size if start % size == 0 else gcd(start, size)
    return torch.div(torch.arange(start, stop, piece, device=device), size, rounding_mode="floor"), piece


def expand_columns(per_group: Tensor, group_size: int, size: int, group_index: Tensor | None = None) -> Tensor:
    """[N, K] view of [N, G] values: column k takes column k // group_size, or group_index[k]."""
    if group_index is not None:
        return per_group.index_select(1, group_index.long())
    if per_group.shape[1] == 1:
        return per_group.expand(-1, size)
    return torch.repeat_interleave(per_group, group_size, dim=1)[:, :size]
