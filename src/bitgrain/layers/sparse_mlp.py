"""A mixture of experts in the place of an MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from bitgrain.layers.activation import Gate
from bitgrain.layers.experts import Experts
from bitgrain.layers.routing import Router, Routing

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder


class SparseMLP(nn.Module):
    """y = sum over the chosen experts e of p[e] * expert_e(x) for x [M, K]; the router says which, and how much."""

    def __init__(self, builder: ModelBuilder, name: str, join: str | Gate, routing: Routing) -> None:
        super().__init__()
        self.router = Router(builder, name, routing)
        self.experts = Experts(builder, f"{name}.experts", routing.count, join)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x)
        out: Tensor = self.experts(x, weight, chosen)
        return out
