"""Linear maps of a module's input or output: per-channel scales, permutations, rotations; and low-rank corrections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.numerics.hadamard import hadamard_transform

if TYPE_CHECKING:
    from typing_extensions import Self


class Transform(ABC):
    """A linear map of the last axis of x [M, n]: of a module's input before its activation quantization, or of its output."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """[M, n] of x's dtype; computed in float32."""

    @abstractmethod
    def fits(self, k: int) -> bool:
        """Whether it maps vectors of k entries."""

    @abstractmethod
    def data_tensors(self) -> dict[str, Tensor]:
        """The tensors that define it, by field name."""

    @abstractmethod
    def describe(self) -> str:
        """Short text such as "channel scale"."""

    def columns(self, start: int, stop: int) -> Self:
        """The map of the columns [start, stop), where it does not mix them with others."""
        raise ShardError(self.describe(), f"columns [{start}, {stop})", "all columns: the transform mixes them", "shard along N instead")

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The transform with `change` applied to each of its tensors."""
        return replace(self, **{name: change(tensor) for name, tensor in self.data_tensors().items()})  # type: ignore[type-var]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelScale(Transform):
    """x'[m, k] = x[m, k] * scale[k].

    Args:
        scale: float32 [K].
    """

    scale: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return (x.float() * self.scale).to(x.dtype)

    def fits(self, k: int) -> bool:
        return tuple(self.scale.shape) == (k,)

    def columns(self, start: int, stop: int) -> Self:
        return replace(self, scale=self.scale[start:stop])

    def data_tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def describe(self) -> str:
        return "channel scale"


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker(Transform):
    """x viewed [M, a, b] becomes left^T x right; a missing factor is the identity.

    Args:
        left:  float32 [a, a] or None.
        right: float32 [b, b] or None; at least one is there.
        sizes: (a, b), a * b = K.
    """

    left: Tensor | None
    right: Tensor | None
    sizes: tuple[int, int]

    def __post_init__(self) -> None:
        a, b = self.sizes
        wrong = (self.left is None and self.right is None) or (self.left is not None and tuple(self.left.shape) != (a, a))
        if wrong or (self.right is not None and tuple(self.right.shape) != (b, b)):
            shown = [None if f is None else list(f.shape) for f in (self.left, self.right)]
            raise LayoutError("Kronecker", f"factors {shown}", f"[{a}, {a}] and [{b}, {b}], one of which may be absent", "correct the format that made it")

    def apply(self, x: Tensor) -> Tensor:
        y = x.float().reshape(-1, *self.sizes)
        if self.left is not None:
            y = torch.matmul(self.left.t(), y)
        if self.right is not None:
            y = torch.matmul(y, self.right)
        return y.reshape(x.shape).to(x.dtype)

    def fits(self, k: int) -> bool:
        return self.sizes[0] * self.sizes[1] == k

    def data_tensors(self) -> dict[str, Tensor]:
        factors = {"left": self.left, "right": self.right}
        return {name: factor for name, factor in factors.items() if factor is not None}

    def describe(self) -> str:
        return f"rotation by {self.sizes[0]} x {self.sizes[1]}"


@dataclass(frozen=True, slots=True, eq=False)
class Permutation(Transform):
    """x'[m, i] = x[m, index[i]].

    Args:
        index: int64 [n], a permutation.
    """

    index: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.index)

    def fits(self, k: int) -> bool:
        return tuple(self.index.shape) == (k,)

    def data_tensors(self) -> dict[str, Tensor]:
        return {"index": self.index}

    def describe(self) -> str:
        return "permutation"


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard(Transform):
    """x' = factor * x H^T (x H with `transpose`) in blocks of `size` entries, H = base kron Sylvester (numerics.hadamard).

    Args:
        size:      entries per block.
        base:      float32 [m, m] of +-1, or None for a power of two.
        factor:    1 / sqrt(size) for an orthonormal map.
    """

    size: int
    base: Tensor | None
    factor: float
    transpose: bool = False

    def apply(self, x: Tensor) -> Tensor:
        blocks = x.float().unflatten(-1, (-1, self.size))
        return (hadamard_transform(blocks, self.base, self.transpose) * self.factor).reshape(x.shape).to(x.dtype)

    def fits(self, k: int) -> bool:
        return k % self.size == 0

    def columns(self, start: int, stop: int) -> Self:
        if start % self.size or stop % self.size:
            raise ShardError(self.describe(), f"entries [{start}, {stop})", f"whole blocks of {self.size}: the transform mixes them", "choose another parallel size")
        return self

    def data_tensors(self) -> dict[str, Tensor]:
        return {} if self.base is None else {"base": self.base}

    def describe(self) -> str:
        return f"Hadamard of {self.size}"


@dataclass(frozen=True, slots=True, eq=False)
class Rotation(Transform):
    """x' = x matrix, in blocks of the matrix's size.

    Args:
        matrix: float32 [b, b], b dividing n; float64 where it is badly conditioned: the product is computed in its type.
    """

    matrix: Tensor

    def apply(self, x: Tensor) -> Tensor:
        blocks = x.to(self.matrix.dtype).unflatten(-1, (-1, self.matrix.shape[0]))
        return torch.matmul(blocks, self.matrix).reshape(x.shape).to(x.dtype)

    def fits(self, k: int) -> bool:
        return self.matrix.dim() == 2 and self.matrix.shape[0] == self.matrix.shape[1] and k % self.matrix.shape[0] == 0

    def columns(self, start: int, stop: int) -> Self:
        size = self.matrix.shape[0]
        if start % size or stop % size:
            raise ShardError(self.describe(), f"entries [{start}, {stop})", f"whole blocks of {size}: the transform mixes them", "choose another parallel size")
        return self

    def data_tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}

    def describe(self) -> str:
        return f"rotation of {self.matrix.shape[0]}"


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A correction that is added to the product: up (down x).

    Args:
        down: floating point [r, K].
        up:   floating point [N, r].
    """

    down: Tensor
    up: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """float32 [M, N] for x [M, K]."""
        return x.float() @ self.down.float().t() @ self.up.float().t()

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> LowRank:
        """The correction with `change` applied to both factors."""
        return LowRank(change(self.down), change(self.up))
