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
        join:  the name of an activation function, for act(gate) * up; or what joins the two otherwise.
        joint: out features of gate, where gate and up are stored as one module, gate_up_proj; 0: they are two.
    """

    def __init__(self, builder: ModelBuilder, name: str, join: str | Gate, joint: int = 0) -> None:
        super().__init__()
        stored = (f"{name}.gate_proj", f"{name}.up_proj")
        self.gate_up = builder.joint_linear(f"{name}.gate_up_proj", (joint, joint)) if joint else builder.linears(stored)
        self.down = builder.linear(f"{name}.down_proj")
        self.join = Gated(join) if isinstance(join, str) else join
        self.gate = builder.step_kernel("gate", detail=self.join.describe())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        out: Tensor = self.down(self.gate.apply(self.join, gate, up))
        return out
