"""Experts by definition: each runs on the rows that chose it, as two linears by definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitgrain.kernels.base import ExpertsProblem, Fidelity, Join, PreparedExpert, PreparedExperts, Refusal
from bitgrain.kernels.reference.linear import ReferenceLinear
from bitgrain.weights import ActivationSpec, Weight

_LINEAR = ReferenceLinear()


class ReferenceExperts:
    """Every product, the join and every sum rounded to x's dtype, as modules of the transformers library round them.  Takes everything."""

    name = "reference.experts"
    rank = 0

    def fidelity(self, problem: ExpertsProblem) -> Fidelity:
        return Fidelity.EXACT if problem.gate_up_activation.is_none and problem.down_activation.is_none else Fidelity.EMULATED

    def refusal(self, problem: ExpertsProblem) -> Refusal | None:
        return None

    def prepare(
        self,
        gate_up: Weight,
        down: Weight,
        gate_up_activation: ActivationSpec,
        down_activation: ActivationSpec,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> PreparedExpert:
        return PreparedExpert(_LINEAR.prepare(gate_up, gate_up_activation), _LINEAR.prepare(down, down_activation), gate_up_bias, down_bias)

    def assemble(self, experts: Sequence[PreparedExpert], join: Join) -> PreparedExperts:
        return PreparedExperts(tuple(experts), join)

    def apply(self, x: Tensor, weight: Tensor, chosen: Tensor, prepared: PreparedExperts) -> Tensor:
        out = torch.zeros_like(x)
        for index, rows, places in rows_of_experts(chosen):
            expert = prepared.experts[index]
            gate, up = _LINEAR.apply(x[rows], expert.gate_up, expert.gate_up_bias).chunk(2, dim=-1)
            y = _LINEAR.apply(prepared.join(gate, up), expert.down, expert.down_bias)
            # an expert's rows are distinct: no two sums meet in one call
            out.index_add_(0, rows, (y * weight[rows, places, None]).to(out.dtype))
        return out


def rows_of_experts(chosen: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, its rows, the place in each row) of each expert that int64 [M, P] names, by index; -1 names none.

    Rows ascend.
    """
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    indices, counts = torch.unique_consecutive(flat[order], return_counts=True)
    found = []
    for index, part in zip(indices.tolist(), order.split(counts.tolist()), strict=True):
        if index >= 0:
            found.append((index, torch.div(part, chosen.shape[1], rounding_mode="floor"), part % chosen.shape[1]))
    return found
