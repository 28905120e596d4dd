"""Gated feed-forward layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from bitgrain.layers.activation import ACTIVATIONS

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder


class GatedMLP(nn.Module):
    """y = down(act(gate(x)) * up(x)) for x [M, K]."""

    def __init__(self, builder: ModelBuilder, name: str, activation: str) -> None:
        super().__init__()
        self.gate_up = builder.linears((f"{name}.gate_proj", f"{name}.up_proj"))
        self.down = builder.linear(f"{name}.down_proj")
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        out: Tensor = self.down(self.act(gate) * up)
        return out
