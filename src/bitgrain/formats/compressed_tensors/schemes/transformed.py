"""Transforms that run with the model: what their stored tensors mean, and schemes of modules that have them.

    <name>.weight   hadamard, random-hadamard: floats of +-1 [n, n], divided by sqrt(n) at use; random-matrix: any numbers
    <name>.perm     int64 [n], p: the matrix M stands for M[p][:, p]
    x' = x M (x M^T for an inverse) over blocks of n entries; a random-matrix is stored inverted where an inverse is meant
    y' = (y + bias) M: the transform of an output comes behind the bias, unlike that of weights.Transformed

Source: formats specification, section 4; compressed-tensors 0.17 transform/factory (rules, written anew).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.formats.around import SchemeAround
from bitgrain.formats.attention_schemes import HeadTransforms
from bitgrain.formats.base import TensorRule
from bitgrain.formats.value_checks import require_finite
from bitgrain.numerics.hadamard_factors import factor_hadamard, read_signs, require_hadamard
from bitgrain.weights import ChannelScale, Hadamard, Permutation, Rotation, Transform, Transformed, Weight

MATRIX_TYPE = "random-matrix"
# The first is fixed by its size alone.
TYPES = ("hadamard", "random-hadamard", MATRIX_TYPE)
_FLOATS, _INTEGERS = ("F64", "F32", "BF16", "F16"), ("I64", "I32")


@dataclass(frozen=True, slots=True)
class OnlineTransform:
    """One transform at one module.

    Args:
        name:     the local name that its tensors begin with, <group>_<location>.
        location: "input", "output", "q_attn" or "k_cache".
        kind:     one of TYPES.
        size:     entries of a block.
        permuted: a permutation is stored beside the matrix.
        source:   what stands before ".weight" of the stored matrix, under this module or another; "": the matrix is computed.
        module:   the module's name.
    """

    name: str
    location: str
    kind: str
    size: int
    inverse: bool
    permuted: bool
    source: str
    module: str

    def rules(self) -> tuple[TensorRule, ...]:
        """The tensors that it needs, wherever they are stored."""
        if not self.source:
            return ()
        weight = TensorRule(f"{self.name}.weight", _FLOATS, ((self.size, self.size),))
        return (weight, TensorRule(f"{self.name}.perm", _INTEGERS, ((self.size,),))) if self.permuted else (weight,)

    @property
    def borrowed(self) -> tuple[tuple[str, str], ...]:
        """(local name, full name) of the tensors that another module stores."""
        if self.source in ("", f"{self.module}.{self.name}"):
            return ()
        return tuple((rule.name, self.source + rule.name.removeprefix(self.name)) for rule in self.rules())

    def describe(self) -> str:
        return f"{self.kind} {self.size} at {self.location}{', inverse' if self.inverse else ''}{'' if self.source else ', computed'}"

    def to_transforms(self, tensors: Mapping[str, Tensor], width: int) -> tuple[Transform, ...]:
        """The maps of vectors of `width` entries, in order.

        Raises:
            BadValueError: not a Hadamard matrix, not a permutation, not finite.
        """
        weight = tensors.get(f"{self.name}.weight")
        if self.kind == MATRIX_TYPE:
            matrix = require_finite(f"{self.name}.weight", tensors[f"{self.name}.weight"])
            return (Rotation(matrix if matrix.dtype == torch.float64 else matrix.float()),)  # uniform numbers: far from orthogonal
        maps = (Hadamard(self.size, None, self.size**-0.5),) if weight is None else self._hadamard(weight, width // self.size)
        if not self.permuted:
            return maps
        index = _permutation(f"{self.name}.perm", tensors[f"{self.name}.perm"].long())
        starts = torch.arange(0, width, self.size)[:, None]
        return (Permutation((torch.argsort(index) + starts).flatten()), *maps, Permutation((index + starts).flatten()))

    def _hadamard(self, stored: Tensor, blocks: int) -> tuple[Transform, ...]:
        """x M or x M^T for M = diag(signs) H; a dense matrix only where M has no such factors."""
        matrix, factor = read_signs(f"{self.name}.weight", stored), self.size**-0.5
        factors = factor_hadamard(matrix)
        require_hadamard(f"{self.name}.weight", matrix, factors)
        if factors is None:
            dense = matrix.float() * factor
            return (Rotation(dense.t().contiguous() if self.inverse else dense),)
        hadamard = Hadamard(self.size, factors.base, factor, transpose=not self.inverse)
        if factors.signs is None:
            return (hadamard,)
        signs = ChannelScale(factors.signs.repeat(blocks))
        return (hadamard, signs) if self.inverse else (signs, hadamard)


def _permutation(name: str, index: Tensor) -> Tensor:
    if not torch.equal(index.sort().values, torch.arange(len(index))):
        raise BadValueError(name, "an entry twice, or outside", f"each of 0 to {len(index) - 1} once", "the file is damaged; fetch or write it again")
    return index


@dataclass(frozen=True, slots=True)
class TransformedScheme(SchemeAround):
    """Another scheme whose module maps its input or output.

    Args:
        inputs:  in the order in which they run.
        outputs: likewise, behind the bias.
    """

    inputs: tuple[OnlineTransform, ...]
    outputs: tuple[OnlineTransform, ...]

    @property
    def label(self) -> str:
        return f"{self.inner.label}, {', '.join(t.describe() for t in (*self.inputs, *self.outputs))}"

    @property
    def borrowed(self) -> tuple[tuple[str, str], ...]:
        return tuple(pair for transform in (*self.inputs, *self.outputs) for pair in transform.borrowed)

    def tensors(self) -> tuple[TensorRule, ...]:
        return (*self.inner.tensors(), *(rule for transform in (*self.inputs, *self.outputs) for rule in transform.rules()))

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        n, k = self.shape
        inputs = tuple(t for transform in self.inputs for t in transform.to_transforms(tensors, k))
        return Transformed(self.inner.to_weight(tensors), inputs, None, self._output_maps(tensors, n))

    def to_bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The stored bias, mapped as the output is."""
        bias = self.inner.to_bias(tensors)
        if bias is not None and self.outputs:
            for transform in self._output_maps(tensors, bias.shape[0]):
                bias = transform.apply(bias[None])[0]
        return bias

    def _output_maps(self, tensors: Mapping[str, Tensor], n: int) -> tuple[Transform, ...]:
        return tuple(t for transform in self.outputs for t in transform.to_transforms(tensors, n))


@dataclass(frozen=True, slots=True)
class RotatedHeads(HeadTransforms):
    """Transforms of an attention module's queries and keys, each in the order in which they run."""

    queries: tuple[OnlineTransform, ...]
    keys: tuple[OnlineTransform, ...]

    def tensors(self) -> tuple[TensorRule, ...]:
        return tuple(rule for transform in (*self.queries, *self.keys) for rule in transform.rules())

    @property
    def borrowed(self) -> tuple[tuple[str, str], ...]:
        return tuple(pair for transform in (*self.queries, *self.keys) for pair in transform.borrowed)

    def describe(self) -> str:
        return ", ".join(t.describe() for t in (*self.queries, *self.keys))

    def to_transforms(self, tensors: Mapping[str, Tensor], head_dim: int) -> tuple[tuple[Transform, ...], tuple[Transform, ...]]:
        queries, keys = (tuple(t for transform in maps for t in transform.to_transforms(tensors, head_dim)) for maps in (self.queries, self.keys))
        return queries, keys
