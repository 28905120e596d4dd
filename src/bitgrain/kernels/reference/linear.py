"""Linear by definition: quantize the input and back, dequantize the weight, multiply in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.weights import ActivationSpec, Weight

# Rows of the weight that are dequantized at once: bounds the float32 working set.
ROW_BLOCK = 4096


class ReferenceLinear:
    """y = fake_quantize(x) dequantize(W)^T + b in float32, rounded once to x's dtype.  Takes everything."""

    name = "reference.linear"
    rank = 0

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT if problem.activation.is_none else Fidelity.EMULATED

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        return None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        return Prepared(weight.shape, weight.data_tensors(), activation, {"weight": weight})

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        weight: Weight = prepared.meta["weight"]
        n = weight.shape[0]
        values = prepared.activation.fake_quantize(x)
        y = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
        for start in range(0, n, ROW_BLOCK):
            stop = min(n, start + ROW_BLOCK)
            y[:, start:stop] = torch.nn.functional.linear(values, weight.rows(start, stop).dequantize())
        if bias is not None:
            y += bias.float()
        return y.to(x.dtype)
