"""Unquantized weights through torch's own matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.weights import ActivationSpec, DenseWeight, Weight


class DenseLinear:
    """y = x W^T + b, accumulated by torch in float32; where x and W differ, the 16-bit one of them is widened to float32, never narrowed."""

    name = "cpu.dense"
    rank = 40

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        if problem.weight.kind != "dense":
            return Refusal(f"takes dense weights, not {problem.weight.kind} ones")
        if not problem.activation.is_none:
            return Refusal("does not quantize activations")
        if problem.weight.element not in (problem.dtype, "float32") and problem.dtype != "float32":
            return Refusal(f"would round the {problem.weight.element} weight to {problem.dtype}")
        return None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, DenseWeight)  # refusal() asked for the kind
        return Prepared(weight.shape, {"data": weight.data}, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        data = prepared.tensors["data"]
        if data.dtype is torch.float32 and x.dtype is not torch.float32:
            return torch.nn.functional.linear(x.float(), data, None if bias is None else bias.float()).to(x.dtype)
        if data.dtype != x.dtype:
            data = prepared.tensors["data"] = data.to(x.dtype)  # once: the first input tells the dtype
        return torch.nn.functional.linear(x, data, bias)
