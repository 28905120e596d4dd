"""Unquantized weights through torch's own matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.weights import ActivationSpec, DenseWeight, Weight


class DenseLinear:
    """y = x W^T + b in the dtype of activations, accumulated by torch in float32; a 16-bit weight is widened to float32, never narrowed."""

    name = "cpu.dense"
    rank = 40

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        if problem.weight.kind != "dense":
            return Refusal(f"takes dense weights, not {problem.weight.kind} ones")
        if not problem.activation.is_none:
            return Refusal("does not quantize activations")
        if problem.dtype not in (problem.weight.element, "float32"):
            return Refusal(f"would round the {problem.weight.element} weight to {problem.dtype}")
        return None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, DenseWeight)  # refusal() asked for the kind
        return Prepared(weight.shape, {"data": weight.data}, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        data = prepared.tensors["data"]
        if data.dtype != x.dtype:
            data = prepared.tensors["data"] = data.to(x.dtype)  # once: the first input tells the dtype
        return torch.nn.functional.linear(x, data, bias)
