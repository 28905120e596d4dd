"""Unquantized weights through the vendor's matrix product, with sums that stay in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bitgrain.kernels.base import LinearProblem, Prepared
from bitgrain.kernels.torch_library.operators import TorchLinear, missing_dtype
from bitgrain.weights import ActivationSpec, DenseWeight, Weight

# torch's process-wide switches that let a product add up in fewer bits, of inputs of each dtype: (name, the value that forbids it)
_SWITCHES: dict[torch.dtype, tuple[tuple[str, Any], ...]] = {
    torch.bfloat16: (("allow_bf16_reduced_precision_reduction", False),),
    torch.float16: (("allow_fp16_reduced_precision_reduction", False), ("allow_fp16_accumulation", False)),
    # fp32_precision replaces allow_tf32, which may not be read any more once the new one was set
    torch.float32: (("fp32_precision", "ieee"),) if hasattr(torch.backends.cuda.matmul, "fp32_precision") else (("allow_tf32", False),),
}


class DenseLinear(TorchLinear):
    """y = x W^T + b, added up in float32; where x and W differ, the 16-bit one of them is widened to float32, never narrowed."""

    name = "torch.dense"
    rank = 50

    def _problem(self, problem: LinearProblem) -> str:
        if problem.weight.kind != "dense":
            return f"takes dense weights, not {problem.weight.kind} ones"
        if not problem.activation.is_none:
            return "does not quantize activations"
        if problem.weight.element not in (problem.dtype, "float32") and problem.dtype != "float32":
            return f"would round the {problem.weight.element} weight to {problem.dtype}"
        return missing_dtype(self.platform, problem.dtype)

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, DenseWeight)  # _problem() asked for the kind
        return Prepared(weight.shape, {"data": weight.data}, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        data = prepared.tensors["data"]
        if data.dtype is torch.float32 and x.dtype is not torch.float32:
            return full_product(x.float(), data, None if bias is None else bias.float()).to(x.dtype)
        if data.dtype != x.dtype:
            data = prepared.tensors["data"] = data.to(x.dtype)  # once: the first input tells the dtype
        return full_product(x, data, bias)


def full_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed, of one dtype, plus bias [N]: products added up in float32, the result rounded once."""
    with full_sums(x.dtype):
        return torch.nn.functional.linear(x, weight, bias)


@contextmanager
def full_sums(dtype: torch.dtype) -> Iterator[None]:
    """Forbid products of `dtype` to add up partial sums in 16 bits, or to cut float32 to TF32; torch's switches are as before afterwards.

    torch allows both reductions of 16-bit types unless told otherwise.
    Source: torch 2.13 docs/source/notes/cuda.rst, "Reduced Precision Reduction in FP16 GEMMs" and after.
    """
    switches = torch.backends.cuda.matmul
    wanted = [(name, value) for name, value in _SWITCHES[dtype] if hasattr(switches, name)]
    before = [(name, getattr(switches, name)) for name, _ in wanted]
    try:
        for (name, value), (_, old) in zip(wanted, before, strict=True):
            if old != value:
                setattr(switches, name, value)
        yield
    finally:
        for (name, value), (_, old) in zip(wanted, before, strict=True):
            if old != value:
                setattr(switches, name, old)
