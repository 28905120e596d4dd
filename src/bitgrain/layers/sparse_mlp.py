"""A mixture of experts in the place of an MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from bitgrain.layers.activation import Gate
from bitgrain.layers.experts import Experts
from bitgrain.layers.mlp import GatedMLP
from bitgrain.layers.routing import Router, Routing

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An expert that every token goes through, beside those that it chooses.

    Args:
        name: of its module.
        size: out features of its gate and up.
        gate: name of the module [1, K] whose sigmoid says how much of it counts; "": all of it.
    """

    name: str
    size: int
    gate: str = ""


class SparseMLP(nn.Module):
    """y = sum over the chosen experts e of p[e] * expert_e(x), + sigmoid(gate(x)) * shared(x), for x [M, K]."""

    def __init__(self, builder: ModelBuilder, name: str, join: str | Gate, routing: Routing, shared: SharedExpert | None = None) -> None:
        super().__init__()
        self.router = Router(builder, name, routing)
        self.experts = Experts(builder, f"{name}.experts", routing.count, join)
        self.shared = None if shared is None else GatedMLP(builder, f"{name}.{shared.name}", join)
        self.shared_gate = None if shared is None or not shared.gate else builder.linear(f"{name}.{shared.gate}")

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x)
        out: Tensor = self.experts(x, weight, chosen)
        if self.shared is None:
            return out
        beside: Tensor = self.shared(x)
        if self.shared_gate is not None:
            beside = self.shared_gate(x).sigmoid() * beside
        return out + beside
