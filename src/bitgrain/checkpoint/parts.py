"""Parts of stored tensors: one expert of a stack, every second row, a transposed matrix; views, where a view can say it.

A part has a name and a header of its own, so that everything behind it sees one tensor per module, however the file
holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import TensorHeader


@dataclass(frozen=True, slots=True)
class Pick:
    """tensor[..., index, ...] at dimension `dim`; the dimension disappears."""

    dim: int
    index: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.select(self.dim, self.index)


@dataclass(frozen=True, slots=True)
class Cut:
    """tensor[start:stop:step] along dimension `dim`."""

    dim: int
    start: int
    stop: int
    step: int = 1

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(self.dim, 0)[self.start : self.stop : self.step].movedim(0, self.dim)


@dataclass(frozen=True, slots=True)
class Transpose:
    """The last two dimensions exchanged."""

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2)


@dataclass(frozen=True, slots=True)
class Flatten:
    """All dimensions from `start` on become one."""

    start: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(self.start)


@dataclass(frozen=True, slots=True)
class Regroup:
    """The first dimension, viewed as `sizes`, with the last two of them exchanged: rows change places, whole."""

    sizes: tuple[int, int, int]

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.view(*self.sizes, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same elements with other sizes."""

    sizes: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.sizes)


@dataclass(frozen=True, slots=True)
class Shift:
    """Every value plus `by`, in the stored type."""

    by: float

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor + self.by


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


def part_of(header: TensorHeader, name: str, *steps: Step) -> StoredPart:
    """The part of a stored tensor that is called `name`; its shape follows from the steps.

    Raises:
        IndexError, RuntimeError: the steps do not fit the stored shape.
    """
    shaped = torch.empty(header.shape, dtype=torch.uint8, device="meta")
    for step in steps:
        shaped = step(shaped)
    share = header.nbytes * shaped.numel() // max(header.numel, 1)
    virtual = replace(header, name=name, shape=tuple(shaped.shape), stop=header.start + share)
    return StoredPart(virtual, header.name, steps)


def divide(tensors: Mapping[str, TensorHeader], divided: Mapping[str, Iterable[StoredPart]]) -> dict[str, StoredPart]:
    """Every part of a checkpoint by its name: those of `divided` tensors, and all other tensors whole, in stored order."""
    parts: dict[str, StoredPart] = {}
    for name, header in tensors.items():
        for part in divided.get(name, (whole(header),)):
            parts[part.header.name] = part
    return parts
