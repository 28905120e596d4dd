"""Activation functions by the names that configurations use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

_gelu_tanh = partial(functional.gelu, approximate="tanh")

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
}


@dataclass(frozen=True, slots=True)
class Gated:
    """act(gate) * up.

    Args:
        name: a key of ACTIVATIONS.
    """

    name: str

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](gate) * up


@dataclass(frozen=True, slots=True)
class ClampedGate:
    """(up' + 1) * gate' * sigmoid(alpha * gate'), with gate' = min(gate, limit) and up' = up cut to [-limit, limit].

    Source: gpt-oss model card; transformers 5.19 GptOssExperts.
    """

    alpha: float
    limit: float

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


# How a gated MLP joins its two halves.
Gate = Gated | ClampedGate
