"""Unquantized weights, read as they are stored: by the native library, or by torch's own matrix product where that has faster instructions."""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.cpu.library import check, missing, native
from bitgrain.kernels.cpu.native_calls import DenseCall, address
from bitgrain.kernels.cpu.operators import DTYPE_IDS
from bitgrain.weights import ActivationSpec, DenseWeight, Weight

# Rows up to which the native product is the faster one where torch has instructions for a 16-bit dtype; elsewhere it always is.
FEW_ROWS = 8
SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@lru_cache(maxsize=3)
def native_rows(dtype: torch.dtype) -> int:
    """Rows of this dtype that the native library multiplies with dense weights; 0 without it.

    Its products do not depend on the number of rows; torch's do, in their last bits.
    """
    if missing():
        return 0
    fast = dtype in SUPPORTED and torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, SUPPORTED[dtype])()
    return FEW_ROWS if fast else sys.maxsize


class DenseLinear:
    """y = x W^T + b, accumulated in float32; where x and W differ, the 16-bit one of them is widened to float32, never narrowed."""

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
        if 0 < x.shape[0] <= native_rows(x.dtype) and not torch.compiler.is_compiling():
            return self._native(x.contiguous(), prepared, bias)
        data = prepared.tensors["data"]
        if data.dtype is torch.float32 and x.dtype is not torch.float32:
            return torch.nn.functional.linear(x.float(), data, None if bias is None else bias.float()).to(x.dtype)
        if data.dtype != x.dtype:
            data = prepared.tensors["data"] = data.to(x.dtype)  # once: the first input tells the dtype
        return torch.nn.functional.linear(x, data, bias)

    def native_call(self, prepared: Prepared, bias: Tensor | None) -> DenseCall:
        data, (n, k) = prepared.tensors["data"], prepared.shape
        call = DenseCall(data.data_ptr(), address(bias), n, k, DTYPE_IDS[data.dtype])
        call.kept = data  # apply() may put another in its place
        return call

    def _native(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        call = self.native_call(prepared, bias)
        y = x.new_empty(x.shape[0], call.n)
        status = native().bg_dense(
            x.data_ptr(), x.shape[0], call.k, call.weight, call.weight_dtype, call.n, call.bias, y.data_ptr(), DTYPE_IDS[x.dtype], torch.get_num_threads()
        )
        check(status, "dense product")
        return y
