"""Weights that live in another basis than the layer's input and output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.weights.base import Weight, WeightSpec, check_range
from bitgrain.weights.transforms import LowRank, Transform

if TYPE_CHECKING:
    from typing_extensions import Self

# Rows of the identity that are pushed through the transforms at once: bounds the working set of effective().
IDENTITY_ROWS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Transformed(Weight):
    """y = o(inner(t(x)) + up (down t(x))), with t the input transforms one after another, and o those of the output.

    `dequantize()` and the spec are those of `inner`, the weight in the basis in which it is stored; `effective()` is W in
    y = x W^T.  A layer applies the transforms and hands `inner` to a kernel: no kernel sees this class.

    Args:
        inputs:   applied to x in order, before the activation quantization.
        low_rank: added to the product, or None.
        outputs:  applied to the product in order, before the bias.
    """

    inner: Weight
    inputs: tuple[Transform, ...] = ()
    low_rank: LowRank | None = None
    outputs: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        n, k = self.inner.shape
        wrong = [t.describe() for t in self.inputs if not t.fits(k)] + [t.describe() for t in self.outputs if not t.fits(n)]
        if self.low_rank is not None and (self.low_rank.down.shape[1] != k or self.low_rank.up.shape[0] != n):
            wrong.append(f"low rank {list(self.low_rank.down.shape)}, {list(self.low_rank.up.shape)}")
        if wrong or isinstance(self.inner, Transformed):
            raise LayoutError("Transformed", "; ".join(wrong) or "a Transformed inside", f"maps of inputs with K = {k} and outputs with N = {n}", "correct the format that made it")

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
            for transform in self.outputs:
                y = transform.apply(y)
            result[:, start:stop] = y.t()
        return result

    def gather_rows(self, index: Tensor) -> Tensor:
        raise LayoutError("Transformed", "rows looked up as an embedding", "a weight without input transforms", "an embedding has no input to transform")

    def rows(self, start: int, stop: int) -> Self:
        check_range("rows of a Transformed", start, stop, self.shape[0])
        low = None if self.low_rank is None else LowRank(self.low_rank.down, self.low_rank.up[start:stop])
        return replace(self, inner=self.inner.rows(start, stop), low_rank=low, outputs=tuple(t.columns(start, stop) for t in self.outputs))

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
        for place, transform in enumerate(self.outputs):
            held |= {f"outputs.{place}.{name}": tensor for name, tensor in transform.data_tensors().items()}
        return held if self.low_rank is None else {**held, "down": self.low_rank.down, "up": self.low_rank.up}

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        low = None if self.low_rank is None else self.low_rank.map_tensors(change)
        inputs, outputs = (tuple(t.map_tensors(change) for t in maps) for maps in (self.inputs, self.outputs))
        return replace(self, inner=self.inner.map_tensors(change), inputs=inputs, low_rank=low, outputs=outputs)
