"""Experts as two grouped products by npu_grouped_matmul: rows sorted by expert, lists of weights instead of stacked ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitgrain.kernels.base import ExpertsProblem, Fidelity, Join, LinearProblem, Prepared, PreparedExpert, PreparedExperts, Refusal
from bitgrain.kernels.npu.antiquant_layout import GROUPED_OPERATORS, layout_problem
from bitgrain.kernels.npu.grouped_products import DecodedProduct, IntegerProduct, Product, prepare_product
from bitgrain.kernels.npu.integer_input import integer_problem
from bitgrain.kernels.npu.operators import NpuKernel, missing, operators
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight

INTEGER_OPERATORS = ("npu_grouped_matmul", "npu_dynamic_quant")


class NpuExperts(NpuKernel):
    """Gate and up of all experts in one product, their join, down of all experts in one; then each row's terms, added up.

    Each of the two products is one of integers on both sides (W8A8, exact sums in int32), or of 16-bit inputs and an integer weight
    that is decoded inside it (W4A16, W8A16) and rounded to their dtype: approximate.  Values between the products are rounded to x's
    dtype.
    """

    name = "npu.experts"
    needs = (*INTEGER_OPERATORS, *GROUPED_OPERATORS)

    def fidelity(self, problem: ExpertsProblem) -> Fidelity:
        return Fidelity.APPROXIMATE if any(linear.activation.is_none for linear in problem.linears) else Fidelity.NATIVE

    def refusal(self, problem: ExpertsProblem) -> Refusal | None:
        for what, linear in zip(("gate and up", "down"), problem.linears, strict=True):
            why = self._problem(linear)
            if why:
                return Refusal(f"{what}: {why}")
        return None

    def _problem(self, linear: LinearProblem) -> str:
        act = linear.activation
        if act.is_none:
            return layout_problem(self.platform, linear, grouped=True)
        if act.dynamic and act.granularity == "tensor":
            return "quantizes activations per token or with a stored scale: a range of the whole input is one of the rows of each expert"
        if not act.dynamic and act.granularity != "tensor":
            return "takes one stored scale per module"
        return integer_problem(self.platform, linear) or missing(self.platform, *INTEGER_OPERATORS)

    def prepare(
        self,
        gate_up: Weight,
        down: Weight,
        gate_up_activation: ActivationSpec,
        down_activation: ActivationSpec,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> PreparedExpert:
        first, second = (self._prepared(w, a) for w, a in ((gate_up, gate_up_activation), (down, down_activation)))
        return PreparedExpert(first, second, gate_up_bias, down_bias)

    def _prepared(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, IntAffineWeight)  # refusal() asked for the kind
        return prepare_product(weight, activation, operators(self.platform))

    def assemble(self, experts: Sequence[PreparedExpert], join: Join) -> PreparedExperts:
        meta = {
            "gate_up": _product([e.gate_up for e in experts], [e.gate_up_bias for e in experts]),
            "down": _product([e.down for e in experts], [e.down_bias for e in experts]),
        }
        return PreparedExperts(tuple(experts), join, meta)

    def apply(self, x: Tensor, weight: Tensor, chosen: Tensor, prepared: PreparedExperts) -> Tensor:
        if x.shape[0] == 0 or chosen.shape[1] == 0:
            return torch.zeros_like(x)
        ops: Any = operators(self.platform)
        # places without an expert run one and are left out of the sum: the device need not tell how many there are
        expert, order = torch.sort(chosen.flatten().clamp(min=0), stable=True)
        ends = torch.searchsorted(expert, torch.arange(len(prepared.experts), device=x.device), right=True)
        rows = x.index_select(0, torch.div(order, chosen.shape[1], rounding_mode="floor"))
        gate, up = prepared.meta["gate_up"].run(ops, rows, expert, ends).chunk(2, dim=-1)
        sorted_parts = prepared.meta["down"].run(ops, prepared.join(gate, up).contiguous(), expert, ends)
        parts = torch.empty_like(sorted_parts)
        parts[order] = sorted_parts
        return sum_by_expert(parts.view(*chosen.shape, -1), weight, chosen)


def _product(experts: Sequence[Prepared], biases: Sequence[Tensor | None]) -> Product:
    found = None if biases[0] is None else [bias for bias in biases if bias is not None]
    return (DecodedProduct if experts[0].activation.is_none else IntegerProduct)(experts, found)


def sum_by_expert(parts: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """[M, N] of the parts' dtype: weight[m, p] * parts[m, p], added in the order of the experts' indices, each sum rounded.

    Args:
        parts:  [M, P, N].
        chosen: int64 [M, P]; a place with -1 adds nothing, whatever its part.
    """
    terms = (parts * weight[..., None]).to(parts.dtype).masked_fill((chosen < 0)[..., None], 0)
    order = torch.argsort(chosen, dim=1)
    terms = terms.gather(1, order[..., None].expand_as(terms))
    total = torch.zeros_like(terms[:, 0])
    for place in range(chosen.shape[1]):
        total = total + terms[:, place]
    return total
