"""Gated feed-forward layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from bitgrain.layers.activation import Gate, Gated

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder


class GatedMLP(nn.Module):
    """y = down(join(gate(x), up(x))) for x [M, K].

    Args:
        join: the name of an activation function, for act(gate) * up; or what joins the two otherwise.
    """

    def __init__(self, builder: ModelBuilder, name: str, join: str | Gate) -> None:
        super().__init__()
        self.gate_up = builder.linears((f"{name}.gate_proj", f"{name}.up_proj"))
        self.down = builder.linear(f"{name}.down_proj")
        self.join = Gated(join) if isinstance(join, str) else join

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        out: Tensor = self.down(self.join(gate, up))
        return out
