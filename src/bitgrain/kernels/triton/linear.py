"""Linear modules with packed weights: integers of 1 to 8 bits and 8-bit floats, with inputs of 16 bits or of the scheme's own types."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.triton.availability import TritonKernel, missing
from bitgrain.kernels.triton.packed import fidelity_of, input_problem, pack, quantized, weight_problem
from bitgrain.kernels.triton.tuning import tiles_for
from bitgrain.weights import ActivationSpec, Weight


class TritonLinear(TritonKernel):
    """y = sum over segments of a_scale * w_scale * dot(a, code - zero), in float32; 8-bit integer products are exact in int32.

    Decoded codes are exact in 16 bits, and scales multiply float32 sums.  A row's result does not depend on the other rows, nor on their
    number as far as the device's products add up alike.
    """

    name = "triton.linear"

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return fidelity_of(problem, self.target.features)

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        if problem.weight.kind not in ("int_affine", "float"):
            return Refusal(f"takes integer and fp8 weights, not {problem.weight.kind} ones")
        why = weight_problem(problem.weight) or input_problem(problem, self.target.features) or missing(self.platform)
        return Refusal(why) if why else None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        prepared = pack(weight, activation, self.target.features)
        prepared.meta["platform"] = self.target
        return prepared

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        from bitgrain.kernels.triton.linear_kernel import launch

        layout, platform, (n, k) = prepared.meta["layout"], prepared.meta["platform"], prepared.shape
        out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
        if out.numel() == 0:
            return out
        values, scale, zero = quantized(layout, prepared.activation, x)
        tiles = tiles_for(layout, n, k, x.shape[0], x.dtype, platform)
        launch(values, scale, zero, prepared.tensors, layout, bias, out, tiles, platform.cores)
        return out
