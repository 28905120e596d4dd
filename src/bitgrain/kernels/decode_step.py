"""A decode step as a list of operations over buffers: what modules say of themselves, so that a kernel can run all of them at once.

Every row of the step is one new token of a sequence of its own.  A buffer is [rows, width] in the dtype of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from bitgrain.kernels.base import Join, Kernel, Prepared, Weightless


class Undescribed(Exception):
    """A module cannot say what it does as operations of a step; the text says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Columns [first, first + width) of a buffer."""

    buffer: int
    first: int
    width: int

    def split(self, widths: Sequence[int]) -> tuple[Place, ...]:
        """Neighbours of these widths, which cover it."""
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return tuple(Place(self.buffer, self.first + start, width) for start, width in zip(starts, widths, strict=True))


@dataclass(frozen=True, slots=True)
class NormOperation:
    """target = norm of each of the source's `size` neighbours; source and target may be one.  See kernels.step.NormKernel."""

    kernel: Kernel
    source: Place
    target: Place
    size: int
    weight: Tensor
    bias: Tensor | None
    eps: float
    wide: bool


@dataclass(frozen=True, slots=True)
class LinearOperation:
    """target = kernel.apply(source, prepared, bias)."""

    kernel: Kernel
    source: Place
    target: Place
    prepared: Prepared
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class RotaryOperation:
    """Turns the heads of `place`, of `size` entries each, in place.

    Args:
        local: by the angles of layers with a window, where those have their own.
    """

    kernel: Kernel
    place: Place
    size: int
    interleaved: bool
    local: bool


@dataclass(frozen=True, slots=True)
class AppendOperation:
    """Stores keys and values behind the earlier tokens of a layer, as they are."""

    layer: int
    keys: Place
    values: Place


@dataclass(frozen=True, slots=True)
class AttentionOperation:
    """target = attention of the queries over all keys and values of the layer, the new ones included.  See kernels.step.AttentionKernel."""

    kernel: Kernel
    source: Place
    target: Place
    layer: int
    heads: int
    groups: int
    size: int
    window: int | None
    sinks: Tensor | None
    scale: float | None
    cap: float | None


@dataclass(frozen=True, slots=True)
class GateOperation:
    """target = join(gate, up)."""

    kernel: Kernel
    join: Join
    gate: Place
    up: Place
    target: Place


@dataclass(frozen=True, slots=True)
class AddOperation:
    """target = target + source, rounded to the dtype of activations."""

    source: Place
    target: Place


Operation = NormOperation | LinearOperation | RotaryOperation | AppendOperation | AttentionOperation | GateOperation | AddOperation


@dataclass(slots=True)
class StepDescription:
    """The operations of a step in order, and the widths of their buffers; buffer 0 is the embedded tokens, the last target the logits.

    Args:
        stores: per layer (heads, entries of a head) of its keys and values.
    """

    dtype: str
    widths: list[int] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    stores: dict[int, tuple[int, int]] = field(default_factory=dict)
    _named: dict[tuple[str, int], int] = field(default_factory=dict)

    def place(self, name: str, width: int) -> Place:
        """A buffer: the one that was given for this name and width before, or a new one."""
        if (name, width) not in self._named:
            self._named[name, width] = len(self.widths)
            self.widths.append(width)
        return Place(self._named[name, width], 0, width)

    def add(self, operation: Operation) -> None:
        self.operations.append(operation)

    def through(self, module: nn.Module, source: Place, name: str) -> Place:
        """Where a module's output of `source` stands, its operations added; `name` is that of its buffers.

        Raises:
            Undescribed: it cannot say what it does.
        """
        return _describer(module)(self, source, name)  # type: ignore[no-any-return]

    def parts(self, module: nn.Module, source: Place, name: str) -> tuple[Place, ...]:
        """As through(), for a module with several outputs."""
        return _describer(module)(self, source, name)  # type: ignore[no-any-return]


def _describer(module: nn.Module):  # type: ignore[no-untyped-def]
    found = getattr(module, "describe_step", None)
    if found is None:
        raise Undescribed(f"{type(module).__name__} does not describe itself as operations of a step")
    return found


@dataclass(frozen=True, slots=True)
class DecodeStepProblem(Weightless):
    """Running one decode step of a model.

    Args:
        step:     what is to be run; None where a module cannot say.
        obstacle: why not, then.
    """

    dtype: str
    step: StepDescription | None
    obstacle: str = ""

    @property
    def operation(self) -> str:
        return "decode_step"

    @property
    def label(self) -> str:
        """What lists of modules call it."""
        return "decode step"

    def describe(self) -> str:
        return f"{self.label}, {self.dtype}" + ("" if self.step is None else f", {len(self.step.operations)} operations")


@dataclass(frozen=True, slots=True)
class StepRows:
    """What a step computes on.

    Args:
        x:       [rows, width] of buffer 0, is overwritten.
        angles:  (cosine, sine), each [rows, 1, R] of x's dtype: of all layers, and of those with a window.
        stores:  per row int64 [2 * layers]: addresses of the keys and values of each layer, [capacity, heads, size] of x's dtype.
        lengths: per row the tokens before the new one; each below its capacity.
    """

    x: Tensor
    angles: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    stores: tuple[Tensor, ...]
    lengths: tuple[int, ...]


class RunnableStep(Protocol):
    """A step in a kernel's own form."""

    most_rows: int

    def run(self, rows: StepRows) -> Tensor:
        """[rows, width of the last target] of x's dtype, a new tensor; the stores hold the new keys and values."""


class DecodeStepKernel(Protocol):
    """Runs decode steps.  Its results are those of the modules, to the bit."""

    name: str
    rank: int

    def prepare(self, step: StepDescription) -> RunnableStep | None:
        """None: the modules run one by one."""
