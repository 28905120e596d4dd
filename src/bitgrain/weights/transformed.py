"""Weights that live in another basis than the layer's input: per-channel smoothing, rotations, and low-rank corrections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.weights.base import Weight, WeightSpec, check_range

if TYPE_CHECKING:
    from typing_extensions import Self

# Rows of the identity that are pushed through the transforms at once: bounds the working set of effective().
IDENTITY_ROWS = 1024


class InputTransform(ABC):
    """A linear map of a module's input x [M, K], applied before its activation quantization."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """[M, K] of x's dtype; computed in float32."""

    @abstractmethod
    def fits(self, k: int) -> bool:
        """Whether inputs have K = k columns."""

    @abstractmethod
    def data_tensors(self) -> dict[str, Tensor]:
        """The tensors that define it, by field name."""

    @abstractmethod
    def describe(self) -> str:
        """Short text such as "x * channel scale"."""

    def columns(self, start: int, stop: int) -> Self:
        """The map of the columns [start, stop), where it does not mix them with others."""
        raise ShardError(self.describe(), f"columns [{start}, {stop})", "all columns: the transform mixes them", "shard along N instead")

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The transform with `change` applied to each of its tensors."""
        return replace(self, **{name: change(tensor) for name, tensor in self.data_tensors().items()})  # type: ignore[type-var]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelScale(InputTransform):
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
        return "input * channel scale"


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker(InputTransform):
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
        return f"input rotated by {self.sizes[0]} x {self.sizes[1]}"


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


@dataclass(frozen=True, slots=True, eq=False)
class Transformed(Weight):
    """y = inner(t(x)) + up (down t(x)), with t the input transforms one after another.

    `dequantize()` and the spec are those of `inner`, the weight in the basis in which it is stored; `effective()` is W in
    y = x W^T.  A layer applies the transforms and hands `inner` to a kernel: no kernel sees this class.

    Args:
        inputs:   applied to x in order, before the activation quantization.
        low_rank: added to the product, or None.
    """

    inner: Weight
    inputs: tuple[InputTransform, ...] = ()
    low_rank: LowRank | None = None

    def __post_init__(self) -> None:
        n, k = self.inner.shape
        wrong = [t.describe() for t in self.inputs if not t.fits(k)]
        if self.low_rank is not None and (self.low_rank.down.shape[1] != k or self.low_rank.up.shape[0] != n):
            wrong.append(f"low rank {list(self.low_rank.down.shape)}, {list(self.low_rank.up.shape)}")
        if wrong or isinstance(self.inner, Transformed):
            raise LayoutError("Transformed", "; ".join(wrong) or "a Transformed inside", f"maps of inputs with K = {k}", "correct the format that made it")

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def spec(self) -> WeightSpec:
        return self.inner.spec

    def dequantize(self) -> Tensor:
        return self.inner.dequantize()

    def effective(self) -> Tensor:
        n, k = self.shape
        stored = self.inner.dequantize()
        result = torch.empty(n, k)
        for start in range(0, k, IDENTITY_ROWS):
            stop = min(k, start + IDENTITY_ROWS)
            x = torch.zeros(stop - start, k)
            x[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
            for transform in self.inputs:
                x = transform.apply(x)
            y = x @ stored.t()
            if self.low_rank is not None:
                y += self.low_rank.apply(x)
            result[:, start:stop] = y.t()
        return result

    def gather_rows(self, index: Tensor) -> Tensor:
        raise LayoutError("Transformed", "rows looked up as an embedding", "a weight without input transforms", "an embedding has no input to transform")

    def rows(self, start: int, stop: int) -> Self:
        check_range("rows of a Transformed", start, stop, self.shape[0])
        low = None if self.low_rank is None else LowRank(self.low_rank.down, self.low_rank.up[start:stop])
        return replace(self, inner=self.inner.rows(start, stop), low_rank=low)

    def columns(self, start: int, stop: int) -> Self:
        check_range("columns of a Transformed", start, stop, self.shape[1])
        low = None if self.low_rank is None else LowRank(self.low_rank.down[:, start:stop], self.low_rank.up)
        return replace(self, inner=self.inner.columns(start, stop), inputs=tuple(t.columns(start, stop) for t in self.inputs), low_rank=low)

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        raise ShardError("concat of Transformed weights", "parts with input transforms of their own", "one input for all", "run the parts side by side")

    def data_tensors(self) -> dict[str, Tensor]:
        held = dict(self.inner.data_tensors())
        for place, transform in enumerate(self.inputs):
            held |= {f"inputs.{place}.{name}": tensor for name, tensor in transform.data_tensors().items()}
        return held if self.low_rank is None else {**held, "down": self.low_rank.down, "up": self.low_rank.up}

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        low = None if self.low_rank is None else LowRank(change(self.low_rank.down), change(self.low_rank.up))
        return replace(self, inner=self.inner.map_tensors(change), inputs=tuple(t.map_tensors(change) for t in self.inputs), low_rank=low)
