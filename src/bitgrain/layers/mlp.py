"""Gated feed-forward layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from bitgrain.kernels.base import Join
from bitgrain.kernels.decode_step import GateOperation, Place, StepDescription
from bitgrain.layers.activation import Gate, Gated

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder


class GatedLinears(nn.Module):
    """y = down(join(gate(x), up(x))) for x [M, K], of linear modules that have been made.

    Args:
        gate_up: gives gate(x) and up(x).
    """

    def __init__(self, builder: ModelBuilder, gate_up: nn.Module, down: nn.Module, join: Join) -> None:
        super().__init__()
        self.gate_up, self.down, self.join = gate_up, down, join
        self.gate = builder.step_kernel("gate", detail=join.describe())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        out: Tensor = self.down(self.gate.apply(self.join, gate, up))
        return out

    def describe_step(self, step: StepDescription, source: Place, name: str) -> Place:
        """Its operations in a decode step; see kernels.decode_step."""
        gate, up = step.parts(self.gate_up, source, f"{name}.gate_up")
        joined = step.place(f"{name}.joined", gate.width)
        step.add(GateOperation(self.gate, self.join, gate, up, joined))
        return step.through(self.down, joined, f"{name}.down")


class GatedMLP(GatedLinears):
    """The same, of the modules below a name.

    Args:
        join:  the name of an activation function, for act(gate) * up; or what joins the two otherwise.
        joint: out features of gate, where gate and up are stored as one module, gate_up_proj; 0: they are two.
    """

    def __init__(self, builder: ModelBuilder, name: str, join: str | Gate, joint: int = 0) -> None:
        stored = (f"{name}.gate_proj", f"{name}.up_proj")
        gate_up = builder.joint_linear(f"{name}.gate_up_proj", (joint, joint)) if joint else builder.linears(stored)
        super().__init__(builder, gate_up, builder.linear(f"{name}.down_proj"), Gated(join) if isinstance(join, str) else join)
