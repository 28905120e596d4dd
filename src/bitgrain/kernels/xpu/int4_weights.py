"""Four-bit integer weights in groups through the product that torch brings for Intel GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared
from bitgrain.kernels.torch_library.operators import TorchLinear, finished, missing_dtype, operator
from bitgrain.kernels.xpu import contracts
from bitgrain.numerics.bitpack import bytes_as_words
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight


class XpuInt4Linear(TorchLinear):
    """y = x W^T + b with W = (q - z) * s, s rounded to x's dtype and W inside the library: changes numerics by that rounding."""

    name = "xpu.int4_weights"
    rank = 60
    operator = "_weight_int4pack_mm_with_scales_and_zeros"

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.APPROXIMATE

    def _problem(self, problem: LinearProblem) -> str:
        spec = problem.weight
        if spec.kind != "int_affine" or spec.bits != 4 or spec.granularity != "group" or spec.zero == "float" or spec.group_index or spec.row_index:
            return f"takes 4-bit integer weights in groups, in order, with integer zero points, not {spec.describe()}"
        if spec.group_size % contracts.GROUP_STEP or problem.k % spec.group_size:
            return f"takes whole groups of a multiple of {contracts.GROUP_STEP}, not {spec.group_size} in K = {problem.k}"
        if not problem.activation.is_none:
            return "does not quantize activations"
        if problem.dtype == "float32":
            return "takes 16-bit activations"
        return missing_dtype(self.platform, problem.dtype)

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, IntAffineWeight)  # _problem() asked for the kind
        n, _ = weight.shape
        scale = weight.scale.expand(n, -1)
        zero = weight.zero if isinstance(weight.zero, Tensor) else torch.full_like(scale, weight.zero, dtype=torch.int16)
        if bool((zero.to(torch.int8) != zero).any()):
            raise BadValueError("weight", f"zero points from {int(zero.min())} to {int(zero.max())}", "values that int8 holds", "the file is damaged; fetch or write it again")
        tensors = {"codes": bytes_as_words(weight.packed), "scale": scale.t().contiguous(), "zero": zero.expand(n, -1).t().contiguous().to(torch.int8)}
        return Prepared(weight.shape, tensors, activation, {"group": weight.group_size})

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        held = prepared.tensors
        if x.shape[0] == 0:
            return x.new_zeros(0, prepared.shape[0])
        if held["scale"].dtype != x.dtype:
            held["scale"] = held["scale"].to(x.dtype)  # once: the first input tells the dtype
        product = operator(x, "_weight_int4pack_mm_with_scales_and_zeros", contracts.weight_int4pack_mm_with_scales_and_zeros)
        y = product(x, held["codes"], prepared.meta["group"], held["scale"], held["zero"])
        return y if bias is None else finished(y.float(), bias, x.dtype)
