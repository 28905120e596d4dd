"""Eight-bit integer weights with 16- or 32-bit activations, exact, through torch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import LinearProblem, Prepared
from bitgrain.kernels.torch_library import contracts
from bitgrain.kernels.torch_library.dense import full_product, full_sums
from bitgrain.kernels.torch_library.operators import TorchLinear, finished, missing_dtype, operator
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight

# Rows up to which the operator is faster than expanding the weight: it reads the weight once per row.
FEW_ROWS = 8


class Int8WeightLinear(TorchLinear):
    """y = s_w (x . (q_w - 128)) + b, added up in float32, for few rows by torch's operator, which multiplies in float32; for many by
    the vendor's product with codes expanded to x's dtype, where they are exact.

    Below Triton's kernels: neither way comes near the rate at which the weight can be read.
    """

    name = "torch.int8_weights"
    rank = 20
    operator = "_weight_int8pack_mm"

    def _problem(self, problem: LinearProblem) -> str:
        spec = problem.weight
        if spec.kind != "int_affine" or spec.bits != 8 or spec.zero != "constant":
            return f"takes 8-bit integer weights without zero points, not {spec.describe()}"
        if spec.granularity not in ("channel", "tensor") or spec.group_index or spec.row_index:
            return "takes one scale per channel or tensor of the weight"
        if not problem.activation.is_none:
            return "does not quantize activations"
        return missing_dtype(self.platform, problem.dtype)

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, IntAffineWeight)  # _problem() asked for the kind
        n, k = weight.shape
        codes = (weight.packed.view(n, k) ^ 128).view(torch.int8)
        tensors = {"codes": codes, "scale": weight.scale.float().reshape(-1).expand(n).contiguous()}
        assert isinstance(weight.zero, int)
        if weight.zero != 128:  # code - zero = (code - 128) + (128 - zero): a sum of x joins
            tensors["offset"] = torch.full((1, 1), float(128 - weight.zero), device=codes.device)
        return Prepared((n, k), tensors, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        codes, scale = prepared.tensors["codes"], prepared.tensors["scale"]
        if x.shape[0] == 0:
            return x.new_zeros(0, codes.shape[0])
        if x.shape[0] <= FEW_ROWS:
            sums = operator(x, "_weight_int8pack_mm", contracts.weight_int8pack_mm)(x.float(), codes, scale)
        else:
            sums = _float_sums(x, codes) * scale
        if "offset" in prepared.tensors:
            sums = sums + x.float().sum(1, keepdim=True) * prepared.tensors["offset"] * scale
        return finished(sums, bias, x.dtype)


def _float_sums(x: Tensor, codes: Tensor) -> Tensor:
    """float32 [M, N] of x [M, K] times int8 codes [N, K], which every float type of x holds exactly."""
    if x.dtype is torch.float32 or x.device.type == "cpu":
        return full_product(x.float(), codes.float())
    with full_sums(x.dtype):
        # written as float32: rounding to 16 bits waits until scale and bias have joined
        sums: Tensor = torch.ops.aten.mm.dtype(x, codes.to(x.dtype).t(), torch.float32)
    return sums
