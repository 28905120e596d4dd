"""The contracts of the fourth noun: problems, refusals, fidelity and the kernel protocols."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bitgrain.weights import NO_ACTIVATION, ActivationSpec, Weight, WeightSpec


class Fidelity(str, Enum):
    """What a kernel does to the numbers that the checkpoint specifies."""

    EXACT = "exact"  # the specified numbers, up to the order of summation
    NATIVE = "native"  # the scheme's own activation quantization, in its own arithmetic
    APPROXIMATE = "approximate"  # changes numerics: only with fidelity="fast"
    EMULATED = "emulated"  # the specified numbers, computed in wider arithmetic than the scheme asks for


@dataclass(frozen=True, slots=True)
class LinearProblem:
    """y[M, N] = quantize(x)[M, K] W[N, K]^T (+ bias).  All that a choice needs; no tensors.

    Args:
        activation: without stored values (ActivationSpec.without_values()).
        dtype:      dtype of x and y: "bfloat16", "float16" or "float32".
        max_rows:   largest M that will be asked for; 0 when any.
    """

    weight: WeightSpec
    activation: ActivationSpec
    n: int
    k: int
    dtype: str
    max_rows: int = 0

    @property
    def operation(self) -> str:
        return "linear"

    def describe(self) -> str:
        return f"linear [{self.n}, {self.k}] {self.weight.describe()}, activation {self.activation.describe()}, {self.dtype}"


@dataclass(frozen=True, slots=True)
class EmbeddingProblem:
    """Rows of W[N, K] for N tokens of a vocabulary."""

    weight: WeightSpec
    n: int
    k: int
    dtype: str

    @property
    def operation(self) -> str:
        return "embedding"

    @property
    def activation(self) -> ActivationSpec:
        return NO_ACTIVATION

    def describe(self) -> str:
        return f"embedding [{self.n}, {self.k}] {self.weight.describe()}, {self.dtype}"


Problem = LinearProblem | EmbeddingProblem


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a kernel does not take a problem, in one sentence."""

    reason: str


@dataclass(slots=True)
class Prepared:
    """A weight in a kernel's own layout.

    Args:
        tensors: everything that apply() reads, by name.
        meta:    sizes and flags that are not tensors.
        activation: with stored static values.
    """

    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    activation: ActivationSpec = NO_ACTIVATION
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the prepared tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@runtime_checkable
class LinearKernel(Protocol):
    """Runs linear modules.

    `name` is "<backend>.<kernel>"; `rank` orders candidates, the highest first (the reference floor is 0).
    """

    name: str
    rank: int

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        """What running `problem` here does to its numbers; only asked when there is no refusal."""

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        """None if the kernel can run the problem on this machine."""

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        """Convert the layout, once; the weight may be freed afterwards."""

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        """y [M, N] of x's dtype, for x [M, K] contiguous; bias [N] of x's dtype or None."""


@runtime_checkable
class EmbeddingKernel(Protocol):
    """Looks up rows."""

    name: str
    rank: int

    def fidelity(self, problem: EmbeddingProblem) -> Fidelity: ...

    def refusal(self, problem: EmbeddingProblem) -> Refusal | None: ...

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared: ...

    def apply(self, index: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        """[len(index), K] of `dtype` for int64 [M]."""


Kernel = Any  # a member of one of the protocols; each operation's layer knows which
