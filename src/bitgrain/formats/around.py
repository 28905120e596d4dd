"""A scheme around another one, for what stands beside a weight: input scales, rotations, corrections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bitgrain.formats.base import Scheme, TensorRule
from bitgrain.weights import ActivationSpec, WeightSpec


@dataclass(frozen=True, slots=True)
class SchemeAround(Scheme):
    """Everything as the inner scheme says; subclasses add tensors and wrap its weight.

    Args:
        inner: the scheme of the weight; its activation is that of the transformed input.
    """

    inner: Scheme

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.inner.shape

    @property
    def activation(self) -> ActivationSpec:  # type: ignore[override]
        return self.inner.activation

    @property
    def weight_spec(self) -> WeightSpec:
        return self.inner.weight_spec

    @property
    def transforms_input(self) -> bool:
        return True

    @property
    def holds_bias(self) -> bool:
        return self.inner.holds_bias

    def bias_rule(self) -> TensorRule:
        return self.inner.bias_rule()

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return self.inner.to_activation(tensors)

    def to_bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return self.inner.to_bias(tensors)
