"""Unquantized weights in the layout of the native kernels: experts, and types of x and W that torch's product has no exact way for."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.cpu import panels
from bitgrain.kernels.cpu.native_kernel import NativeKernel
from bitgrain.weights import ActivationSpec, DenseWeight, Weight

KINDS = {torch.bfloat16: panels.DENSE_BF16, torch.float16: panels.DENSE_F16, torch.float32: panels.DENSE_F32}
# columns whose products are summed apart, so that long rows lose no precision
SPAN = 512


class DensePanels(NativeKernel):
    """y = x W^T in float32, whatever the types of x and W.  A scheme's activation quantization is applied to x first."""

    name = "cpu.dense_panels"
    rank = 30

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT if problem.activation.is_none else Fidelity.EMULATED

    def _refusal(self, problem: LinearProblem) -> Refusal | None:
        return None if problem.weight.kind == "dense" else Refusal(f"takes dense weights, not {problem.weight.kind} ones")

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, DenseWeight)  # refusal() asked for the kind
        gather, group_ends = panels.layout_columns(weight.shape[1], SPAN, None)
        placed = panels.pad_rows(panels.place_columns(weight.data, gather, int(group_ends[-1]) * panels.UNIT, 0))
        pack = panels.pack_pairs if weight.data.dtype == torch.bfloat16 else panels.pack_columns
        return Prepared(weight.shape, {"codes": pack(placed), "group_ends": group_ends}, activation, {"kind": KINDS[weight.data.dtype], "zero": 0.0})

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return self._grouped(x, prepared, bias)
