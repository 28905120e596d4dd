"""Experts on the toychip: each runs on the rows that chose it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitgrain.kernels.base import ExpertsProblem, Fidelity, Join, PreparedExpert, PreparedExperts, Refusal
from bitgrain.weights import ActivationSpec, IntAffineWeight
from toy_backend.linear import Int8Linear


class Int8Experts:
    """The integer product twice, their join between them, and the weighted sum in the order of the experts."""

    name = "toychip.experts"
    rank = 50

    def __init__(self, platform: str) -> None:
        self.linear = Int8Linear(platform)

    def fidelity(self, problem: ExpertsProblem) -> Fidelity:
        return Fidelity.NATIVE

    def refusal(self, problem: ExpertsProblem) -> Refusal | None:
        return next(filter(None, map(self.linear.refusal, problem.linears)), None)

    def prepare(
        self, gate_up: IntAffineWeight, down: IntAffineWeight, gate_up_activation: ActivationSpec, down_activation: ActivationSpec,
        gate_up_bias: Tensor | None, down_bias: Tensor | None,
    ) -> PreparedExpert:  # fmt: skip
        return PreparedExpert(self.linear.prepare(gate_up, gate_up_activation), self.linear.prepare(down, down_activation), gate_up_bias, down_bias)

    def assemble(self, experts: Sequence[PreparedExpert], join: Join) -> PreparedExperts:
        return PreparedExperts(tuple(experts), join)

    def apply(self, x: Tensor, weight: Tensor, chosen: Tensor, prepared: PreparedExperts) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for index, expert in enumerate(prepared.experts):
            rows, places = (chosen == index).nonzero(as_tuple=True)
            gate, up = self.linear.apply(x[rows], expert.gate_up, expert.gate_up_bias).chunk(2, dim=-1)
            y = self.linear.apply(prepared.join(gate, up), expert.down, expert.down_bias)
            out[rows] += y.float() * weight[rows, places, None].float()
        return out.to(x.dtype)
