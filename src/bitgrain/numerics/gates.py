"""What stands between the two products of a gated MLP: activation functions by the names that configurations use, and the joins made of them."""

from __future__ import annotations

import re
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
_CLAMPED = re.compile(r"clamped\(([^,()]+), ([^,()]+)\)")


@dataclass(frozen=True, slots=True)
class Gated:
    """act(gate) * up.

    Args:
        name: a key of ACTIVATIONS.
    """

    name: str

    def describe(self) -> str:
        """The name; of names that mean the same, the first."""
        return next(known for known, function in ACTIVATIONS.items() if function is ACTIVATIONS[self.name])

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](gate) * up


@dataclass(frozen=True, slots=True)
class ClampedGate:
    """(up' + 1) * gate' * sigmoid(alpha * gate'), with gate' = min(gate, limit) and up' = up cut to [-limit, limit].

    Source: gpt-oss model card; transformers 5.19 GptOssExperts.
    """

    alpha: float
    limit: float

    def describe(self) -> str:
        """Both numbers in full, so that parse_gate() gives the same gate."""
        return f"clamped({_short(self.alpha)}, {_short(self.limit)})"

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


# How a gated MLP joins its two halves.
Gate = Gated | ClampedGate


def parse_gate(text: str) -> Gate | None:
    """The gate that describes itself so; None if none here does."""
    if text in ACTIVATIONS:
        return Gated(text)
    found = _CLAMPED.fullmatch(text)
    return ClampedGate(float(found[1]), float(found[2])) if found else None


def _short(value: float) -> str:
    return repr(float(value)).removesuffix(".0")
