"""FP8 on both sides with a scale per row and per token, by npu_quant_matmul: devices that multiply fp8."""

from __future__ import annotations

from torch import Tensor, float32

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.npu.antiquant_layout import LARGEST_SIDE
from bitgrain.kernels.npu.mx_matmul import FP8
from bitgrain.kernels.npu.operators import NpuKernel, features, missing, operators
from bitgrain.weights import ActivationSpec, FloatWeight, Weight

OPERATORS = ("npu_quant_matmul",)


class NpuFloat8Linear(NpuKernel):
    """y = x_codes w_codes * x_scale * w_scale + bias; the product comes in float32, the bias is added to it, and both are rounded once.

    x is quantized in torch's operations, with the numbers that the scheme specifies.
    """

    name = "npu.fp8_matmul"
    needs = OPERATORS

    def _lacking(self) -> str:
        return "" if "fp8_dot" in features(self.platform) else "the device does not multiply fp8"

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.NATIVE

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        why = _problem(problem) or self._lacking() or missing(self.platform, *OPERATORS)
        return Refusal(why) if why else None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, FloatWeight)  # refusal() asked for the kind
        scale = weight.scale.reshape(-1).expand(weight.shape[0]).contiguous()
        return Prepared(weight.shape, {"weight": weight.codes.contiguous(), "scale": scale}, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, prepared.shape[0])
        values, scale, _ = prepared.activation.quantize(x)
        codes, per_token = values.to(FP8[prepared.activation.element]), scale.reshape(-1).expand(x.shape[0]).contiguous()
        y: Tensor = operators(self.platform).npu_quant_matmul(
            codes, prepared.tensors["weight"].t(), prepared.tensors["scale"], pertoken_scale=per_token, output_dtype=float32
        )
        return (y if bias is None else y + bias.float()).to(x.dtype)


def _problem(problem: LinearProblem) -> str:
    """Why the numbers cannot be multiplied so; empty when they can."""
    spec, act = problem.weight, problem.activation
    if spec.kind != "float" or spec.element not in FP8 or spec.granularity not in ("tensor", "channel"):
        return f"takes fp8_e4m3fn and fp8_e5m2 weights with a scale per row or for all, not {spec.describe()}"
    if act.element not in FP8 or act.granularity not in ("token", "tensor") or act.scale_type != "float" or act.outlier_threshold is not None:
        return f"takes fp8 activations with a scale per token or for all, not {act.describe()}"
    return f"takes sides up to {LARGEST_SIDE}" if max(problem.n, problem.k) > LARGEST_SIDE else ""
