"""The contracts of the fourth noun: problems, refusals, fidelity and the kernel protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, Union, runtime_checkable

import torch
from torch import Tensor

from bitgrain.weights import NO_ACTIVATION, ActivationSpec, Hadamard, Weight, WeightSpec

if TYPE_CHECKING:
    from bitgrain.kernels.decode_step import DecodeStepProblem


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
    """Rows of W[N, K] for N tokens of a vocabulary.

    Args:
        head: name of the linear kernel that multiplies with the same W, as the output head; "" where no head shares it.
    """

    weight: WeightSpec
    n: int
    k: int
    dtype: str
    head: str = ""

    @property
    def operation(self) -> str:
        return "embedding"

    @property
    def activation(self) -> ActivationSpec:
        return NO_ACTIVATION

    def describe(self) -> str:
        return f"embedding [{self.n}, {self.k}] {self.weight.describe()}, {self.dtype}{f', shared with {self.head}' if self.head else ''}"


@dataclass(frozen=True, slots=True)
class ExpertsProblem:
    """y[m] = sum over p of weight[m, p] * down_e(join(gate_e(x[m]), up_e(x[m]))), e = chosen[m, p]; all experts alike.

    Args:
        gate_up: gate and up stacked, [2 * size, hidden]: first all rows of gate, then all rows of up.
        down:    [hidden, size].
        gate_up_activation, down_activation: without stored values; each expert may have values of its own.
        count:   how many experts there are.
        join:    what Join.describe() says: "silu", "clamped(1.702, 7)".
        biased:  gate, up and down have biases.
        dtype:   dtype of x and y: "bfloat16", "float16" or "float32".
        max_rows: largest M that will be asked for; 0 when any.
    """

    gate_up: WeightSpec
    down: WeightSpec
    gate_up_activation: ActivationSpec
    down_activation: ActivationSpec
    count: int
    hidden: int
    size: int
    join: str
    biased: bool
    dtype: str
    max_rows: int = 0

    @property
    def operation(self) -> str:
        return "experts"

    @property
    def weight(self) -> WeightSpec:
        """That of gate and up; down has its own."""
        return self.gate_up

    @property
    def activation(self) -> ActivationSpec:
        """That of gate and up; down has its own."""
        return self.gate_up_activation

    @property
    def linears(self) -> tuple[LinearProblem, LinearProblem]:
        """(gate and up, down) of one expert, as the linear problems that they are."""
        return (
            LinearProblem(self.gate_up, self.gate_up_activation, 2 * self.size, self.hidden, self.dtype, self.max_rows),
            LinearProblem(self.down, self.down_activation, self.hidden, self.size, self.dtype, self.max_rows),
        )

    def describe(self) -> str:
        down = self.down.describe() + (f", activation {self.down_activation.describe()}" if self.down_activation != self.gate_up_activation else "")
        other = f", down {down}" if (self.down, self.down_activation) != (self.gate_up, self.gate_up_activation) else ""
        return (
            f"experts {self.count} x [{2 * self.size}, {self.hidden}] {self.gate_up.describe()}{other}, activation {self.gate_up_activation.describe()}, "
            f"{self.join}{', bias' if self.biased else ''}, {self.dtype}"
        )


class Weightless:
    """A problem without a weight or an activation specification."""

    __slots__ = ()

    @property
    def weight(self) -> WeightSpec:
        return WeightSpec("none", "none", 0)

    @property
    def activation(self) -> ActivationSpec:
        return NO_ACTIVATION


@dataclass(frozen=True, slots=True)
class HadamardProblem(Weightless):
    """The Walsh-Hadamard transform of blocks of `size` entries, with a base matrix of `order` rows (1: none)."""

    size: int
    order: int
    dtype: str

    @property
    def operation(self) -> str:
        return "hadamard"

    def describe(self) -> str:
        return f"hadamard of {self.size}{f', base {self.order}' if self.order > 1 else ''}, {self.dtype}"


@dataclass(frozen=True, slots=True)
class StepProblem(Weightless):
    """One computation between matrix products, the same for all of a model's modules; see kernels.step.

    Args:
        operation: "norm", "rotary", "gate" or "attention".
        size:      entries of a row (norm) or of a head (rotary, attention); 0: any.
        detail:    what the computation is, where there are several: the gate's name.
        dtype:     of its inputs and outputs: "bfloat16", "float16" or "float32".
    """

    operation: str
    size: int
    dtype: str
    detail: str = ""

    @property
    def label(self) -> str:
        """What lists of modules call the computation."""
        return self.operation + (f" of {self.detail}" if self.detail else "") + (f" over {self.size}" if self.size else "")

    def describe(self) -> str:
        return f"{self.label}, {self.dtype}"


Problem = Union[LinearProblem, EmbeddingProblem, ExpertsProblem, HadamardProblem, StepProblem, "DecodeStepProblem"]


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


@runtime_checkable
class HadamardKernel(Protocol):
    """Transforms inputs or outputs of modules."""

    name: str
    rank: int

    def fidelity(self, problem: HadamardProblem) -> Fidelity: ...

    def refusal(self, problem: HadamardProblem) -> Refusal | None: ...

    def prepare(self, transform: Hadamard) -> Prepared: ...

    def apply(self, x: Tensor, prepared: Prepared) -> Tensor:
        """The transform of x [..., n] in its last axis, of x's dtype; n is a multiple of the size."""


@runtime_checkable
class Join(Protocol):
    """How a gated MLP joins its halves, elementwise: h = join(gate, up), of their dtype."""

    def describe(self) -> str:
        """A name with its constants: "silu" is silu(gate) * up; "clamped(1.702, 7)" is a ClampedGate of alpha 1.702, limit 7."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor: ...


@dataclass(slots=True)
class PreparedExpert:
    """One expert in a kernel's own layout.

    Args:
        gate_up, down: the two matrices, with their activations' stored values.
        gate_up_bias:  [2 * size] of the dtype of activations, in the order of gate_up's rows, or None.
        down_bias:     [hidden] of the same, or None.
    """

    gate_up: Prepared
    down: Prepared
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the prepared tensors and biases."""
        biases = (b for b in (self.gate_up_bias, self.down_bias) if b is not None)
        return self.gate_up.nbytes + self.down.nbytes + sum(b.numel() * b.element_size() for b in biases)


@dataclass(slots=True)
class PreparedExperts:
    """All experts of one problem; holds the tensors that `meta` points into.

    Args:
        meta: tables that assemble() made of them.
    """

    experts: tuple[PreparedExpert, ...]
    join: Join
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all prepared experts."""
        return sum(expert.nbytes for expert in self.experts)


@runtime_checkable
class ExpertsKernel(Protocol):
    """Runs the experts of one layer.

    An expert's products, what joins them, and its result are rounded to x's dtype as separate linear modules round them, or
    less often; results add up in the order of the experts' indices.  A row's result does not depend on the other rows, except
    through an activation quantization whose range is that of the whole input (the rows that an expert gets).
    """

    name: str
    rank: int

    def fidelity(self, problem: ExpertsProblem) -> Fidelity: ...

    def refusal(self, problem: ExpertsProblem) -> Refusal | None: ...

    def prepare(
        self,
        gate_up: Weight,
        down: Weight,
        gate_up_activation: ActivationSpec,
        down_activation: ActivationSpec,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> PreparedExpert:
        """Convert one expert's layout, once; the weights may be freed afterwards.  Activations have their stored values."""

    def assemble(self, experts: Sequence[PreparedExpert], join: Join) -> PreparedExperts:
        """All experts of a problem, in the order of their indices: tables only, no copies of weights."""

    def apply(self, x: Tensor, weight: Tensor, chosen: Tensor, prepared: PreparedExperts) -> Tensor:
        """y [M, hidden] of x's dtype for x [M, hidden] contiguous.

        Args:
            weight: [M, per_token] of x's dtype or float32.
            chosen: int64 [M, per_token]; -1: no expert there.  An expert stands at most once in a row.
        """


Kernel = Any  # a member of one of the protocols; each operation's layer knows which
