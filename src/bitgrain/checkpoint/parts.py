"""Parts of stored tensors: one expert of a stack, every second row, a transposed matrix; views, where a view can say it.

A part has a name and a header of its own, so that everything behind it sees one tensor per module, however the file
holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.errors import BitgrainError, UnexpectedTensorError, raise_all

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pick:
    """tensor[..., index, ...] at dimension `dim`; the dimension disappears."""

    dim: int
    index: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.select(self.dim, self.index)

    def shape_of(self, shape: Shape) -> Shape:
        if not 0 <= self.index < shape[self.dim]:
            raise IndexError(f"entry {self.index} of dimension {self.dim} of {list(shape)}")
        return (*shape[: self.dim], *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Cut:
    """tensor[start:stop:step] along dimension `dim`."""

    dim: int
    start: int
    stop: int
    step: int = 1

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(self.dim, 0)[self.start : self.stop : self.step].movedim(0, self.dim)

    def shape_of(self, shape: Shape) -> Shape:
        if not 0 <= self.start < self.stop <= shape[self.dim]:
            raise IndexError(f"entries {self.start} to {self.stop} of dimension {self.dim} of {list(shape)}")
        return (*shape[: self.dim], len(range(self.start, self.stop, self.step)), *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Transpose:
    """The last two dimensions exchanged."""

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2)

    def shape_of(self, shape: Shape) -> Shape:
        *outer, rows, columns = shape
        return (*outer, columns, rows)


@dataclass(frozen=True, slots=True)
class Flatten:
    """All dimensions from `start` on become one."""

    start: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(self.start)

    def shape_of(self, shape: Shape) -> Shape:
        return (*shape[: self.start], prod(shape[self.start :]))


@dataclass(frozen=True, slots=True)
class Regroup:
    """The first dimension, viewed as `sizes`, with the last two of them exchanged: rows change places, whole."""

    sizes: tuple[int, int, int]

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.view(*self.sizes, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)

    def shape_of(self, shape: Shape) -> Shape:
        if prod(self.sizes) != shape[0]:
            raise ValueError(f"{list(self.sizes)} for a first dimension of {shape[0]}")
        return shape


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same elements with other sizes."""

    sizes: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.sizes)

    def shape_of(self, shape: Shape) -> Shape:
        if prod(self.sizes) != prod(shape):
            raise ValueError(f"{list(self.sizes)} for {list(shape)}")
        return self.sizes


@dataclass(frozen=True, slots=True)
class Shift:
    """Every value plus `by`, in the stored type."""

    by: float

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor + self.by

    def shape_of(self, shape: Shape) -> Shape:
        return shape


Step = Pick | Cut | Transpose | Flatten | Regroup | Reshape | Shift


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One module's share of a stored tensor.

    Args:
        header: name, element type, shape and size of the part, as if it were stored so.
        source: full name of the stored tensor.
        steps:  applied to the stored tensor, in order; empty for all of it.
    """

    header: TensorHeader
    source: str
    steps: tuple[Step, ...] = ()

    def of(self, stored: Tensor) -> Tensor:
        """The part, a view of the stored tensor where the steps allow one."""
        for step in self.steps:
            stored = step(stored)
        return stored


def whole(header: TensorHeader) -> StoredPart:
    """The part that is all of a stored tensor."""
    return StoredPart(header, header.name)


def shared(header: TensorHeader, name: str) -> StoredPart:
    """All of a stored tensor once more, for another module that uses it and calls it `name`; its bytes count where it is stored."""
    return StoredPart(TensorHeader(name, header.dtype, header.shape, header.file, header.start, header.start), header.name)


def part_of(header: TensorHeader, name: str, *steps: Step) -> StoredPart:
    """The part of a stored tensor that is called `name`; its shape follows from the steps.

    Raises:
        IndexError, ValueError: the steps do not fit the stored shape.
    """
    shape = header.shape
    for step in steps:
        shape = step.shape_of(shape)
    share = header.nbytes * prod(shape) // max(header.numel, 1)
    virtual = TensorHeader(name, header.dtype, shape, header.file, header.start, header.start + share)
    return StoredPart(virtual, header.name, steps)


def divide(tensors: Mapping[str, TensorHeader], divided: Mapping[str, Iterable[StoredPart]]) -> dict[str, StoredPart]:
    """Every part of a checkpoint by its name: those of `divided` tensors, and all other tensors whole, in stored order.

    Raises:
        UnexpectedTensorError: two stored tensors give a part of the same name; one error for each such pair.
    """
    parts: dict[str, StoredPart] = {}
    doubled: dict[tuple[str, str], list[str]] = {}
    for name, header in tensors.items():
        for part in divided.get(name, (whole(header),)):
            own = part.header.name
            if own in parts:
                doubled.setdefault((parts[own].source, name), []).append(own)
            parts[own] = part
    raise_all("parts of stored tensors", [_doubled(tensors[second], first, names) for (first, second), names in doubled.items()])
    return parts


def join(tensors: Mapping[str, TensorHeader], *divisions: Mapping[str, StoredPart]) -> dict[str, StoredPart]:
    """The parts of several divisions of different stored tensors as one; see divide()."""
    divided: dict[str, list[StoredPart]] = {}
    for parts in divisions:
        for part in parts.values():
            divided.setdefault(part.source, []).append(part)
    return divide(tensors, divided)


def _doubled(second: TensorHeader, first: str, names: list[str]) -> BitgrainError:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return UnexpectedTensorError(
        f"{second.file}: {second.name}", f"holds {shown}, which {first} holds too", "each matrix once", "remove one of the two, or fetch the right checkpoint"
    )
