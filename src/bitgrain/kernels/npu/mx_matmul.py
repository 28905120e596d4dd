"""Microscaled weights and activations, by npu_quant_matmul with e8m0 scales: devices that multiply them natively."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.npu.antiquant_layout import LARGEST_SIDE
from bitgrain.kernels.npu.integer_input import HALF
from bitgrain.kernels.npu.operators import NpuKernel, features, missing, operators
from bitgrain.numerics.block_scales import encode_block_scale
from bitgrain.numerics.small_floats import E2M1, decode, encode
from bitgrain.weights import ActivationSpec, BlockFloatWeight, Weight

OPERATORS = ("npu_quant_matmul", "npu_dynamic_mx_quant")
BLOCK = 32
# scales come in pairs: K is filled to whole ones
PAIR = 2 * BLOCK
FP4 = "fp4_e2m1"
FP8 = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class NpuMicroscaledLinear(NpuKernel):
    """y = sum over blocks of 32 of x_scale * w_scale * dot(x_codes, w_codes), plus bias.

    fp8 or 4-bit floats on both sides; 4-bit weights beside fp8 activations are widened to fp8, which holds them exactly.  x is quantized
    by npu_dynamic_mx_quant where the scheme's exponents are the operator's (floor), else in torch's operations.
    """

    name = "npu.mx_matmul"
    needs = OPERATORS

    def _lacking(self) -> str:
        return "" if "scaled_dot" in features(self.platform) else "the device does not multiply microscaled numbers"

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.NATIVE

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        why = _problem(problem) or self._lacking() or missing(self.platform, *OPERATORS)
        return Refusal(why) if why else None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, BlockFloatWeight)  # refusal() asked for the kind
        k = weight.in_features
        codes = pad(weight.codes(), (0, -k % PAIR))
        if weight.element in FP8:
            held = codes.view(FP8[weight.element])
        elif activation.element in FP8:
            held = decode(codes, E2M1).to(FP8[activation.element])
        else:
            held = codes[:, 0::2] | (codes[:, 1::2] << 4)
        # the pair of a block that is not there has no columns but zeros
        scale = pad(weight.scale, (0, -weight.scale.shape[1] % 2)).view(weight.shape[0], -1, 2)
        return Prepared(weight.shape, {"weight": held, "scale": scale}, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        n, ops, tensors = prepared.shape[0], operators(self.platform), prepared.tensors
        if x.shape[0] == 0:
            return x.new_empty(0, n)
        codes, scale = _quantize(ops, prepared.activation, pad(x, (0, -x.shape[1] % PAIR)))
        types = {"x1_dtype": ops.float4_e2m1fn_x2, "x2_dtype": ops.float4_e2m1fn_x2} if codes.dtype == torch.uint8 else {}
        y: Tensor = ops.npu_quant_matmul(
            codes, tensors["weight"].t(), tensors["scale"].transpose(0, 1), scale_dtype=ops.float8_e8m0fnu, pertoken_scale=scale,
            pertoken_scale_dtype=ops.float8_e8m0fnu, bias=None if bias is None else bias.float(), output_dtype=x.dtype, group_sizes=[1, 1, BLOCK], **types,
        )  # fmt: skip
        return y


def _problem(problem: LinearProblem) -> str:
    """Why the numbers cannot be multiplied so; empty when they can."""
    spec, act = problem.weight, problem.activation
    if spec.kind != "block_float" or spec.scale_dtype != "e8m0" or spec.second_scale != "none" or spec.group_size != BLOCK:
        return f"takes blocks of {BLOCK} with one e8m0 scale, not {spec.describe()}"
    if spec.element not in (FP4, *FP8):
        return f"takes fp4_e2m1, fp8_e4m3fn and fp8_e5m2, not {spec.element}"
    if act.scale_type != "e8m0" or act.granularity != "group" or act.group_size != BLOCK or act.second_scale != "none":
        return f"takes activations in blocks of {BLOCK} with one e8m0 scale, not {act.describe()}"
    if not act.dynamic or act.clipped or act.outlier_threshold is not None or act.upper_bound is not None or act.lower_bound is not None:
        return "takes activations without bounds, clipping or outliers"
    if act.element not in (FP4, *FP8) or (act.element == FP4 and spec.element != FP4):
        return f"multiplies {spec.element} with fp8 activations or its own kind, not {act.element}"
    return f"takes sides up to {LARGEST_SIDE}" if max(problem.n, problem.k + PAIR) > LARGEST_SIDE else ""


def _quantize(operators: object, activation: ActivationSpec, x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) as npu_dynamic_mx_quant returns them."""
    small = activation.element == FP4
    if activation.exponent_rule == "floor" and x.dtype in HALF:
        kind = operators.float4_e2m1fn_x2 if small else FP8[activation.element]  # type: ignore[attr-defined]
        found: tuple[Tensor, Tensor] = operators.npu_dynamic_mx_quant(x, dst_type=kind)  # type: ignore[attr-defined]
        return found
    values, scale, _ = activation.quantize(x)
    scales = encode_block_scale(scale, "e8m0").view(x.shape[0], -1, 2)
    if not small:
        return values.to(FP8[activation.element]), scales
    nibbles = encode(values, E2M1)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scales
