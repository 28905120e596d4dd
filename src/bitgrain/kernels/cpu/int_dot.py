"""W8A8: 8-bit integer weights and activations, multiplied in integers."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.cpu import panels
from bitgrain.kernels.cpu.native_calls import IntegerCall, NativeCall, address
from bitgrain.kernels.cpu.native_kernel import NativeKernel
from bitgrain.kernels.cpu.native_packing import QUADS, pack_units
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight

# 255 * 128 * K must stay below 2^31
MAX_K = 65_536
# where the native quantizer takes its ranges from; native/include/kernels.hpp
STATIC, RANGES = 0, {"token": 1, "tensor": 2}
SYMMETRIC, RECIPROCAL = 1, 2


class IntDotLinear(NativeKernel):
    """y = (dot(a, w) - a_zero * sum(w)) * a_scale * w_scale, the dot product exact in int32.

    Activations are quantized per token or per tensor, dynamically or with stored values, as ActivationSpec defines.
    """

    name = "cpu.int8_dot"
    rank = 60

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.NATIVE

    def _refusal(self, problem: LinearProblem) -> Refusal | None:
        spec, act = problem.weight, problem.activation
        if spec.kind != "int_affine" or spec.granularity not in ("tensor", "channel") or spec.zero != "constant" or spec.group_index:
            return Refusal("takes symmetric integer weights with a scale per channel or tensor")
        if act.element != "int8":
            return Refusal(f"multiplies int8 activations, and the scheme has {act.describe()} ones")
        if act.granularity not in ("token", "tensor"):
            return Refusal(f"quantizes activations per token or tensor, not per {act.granularity}")
        if act.scale_type != "float" or act.upper_bound is not None or act.lower_bound is not None or act.clipped or act.outlier_threshold is not None:
            return Refusal("computes plain scales only: no upper bound, clipping or outliers")
        if spec.row_index:
            return Refusal("takes scales of rows in order")
        if problem.k > MAX_K:
            return Refusal(f"sums in 32 bits, enough for K up to {MAX_K}")
        return None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, IntAffineWeight) and isinstance(weight.zero, int)  # refusal() asked for both
        n, k = weight.shape
        units = -(-k // panels.UNIT)
        if weight.bits == 8 and weight.zero == 128:  # signed bytes whose top bit was flipped
            packed, sums = pack_units(weight.packed, 8, k, None, units, QUADS, 128, 0x80), weight.packed.sum(1, dtype=torch.int32) - 128 * k
        else:
            signed = weight.codes().to(torch.int16).sub_(weight.zero).to(torch.int8)
            packed, sums = pack_units(signed, 8, k, None, units, QUADS), signed.sum(1, dtype=torch.int32)
        scale = weight.scale.float().reshape(-1).expand(n).contiguous()
        tensors = {
            "codes": packed.view(torch.int8).view(packed.shape[0], -1, 64),
            "scale": panels.pad_rows(scale),
            "column_sums": panels.pad_rows(sums),
        }
        return Prepared((n, k), tensors, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        from bitgrain.kernels.cpu.operators import integer_linear

        t = prepared.tensors
        y: Tensor = integer_linear(x, t["codes"], t["scale"], t["column_sums"], bias, prepared.shape[0], *quantizer_of(prepared.activation))
        return y

    def native_call(self, prepared: Prepared, bias: Tensor | None) -> NativeCall:
        t, (n, k), (rules, ranges, scale, zero, top) = prepared.tensors, prepared.shape, quantizer_of(prepared.activation)
        return IntegerCall(
            address(t["codes"]), address(t["scale"]), address(t["column_sums"]), address(bias), n, k, t["codes"].shape[1], rules, ranges, zero, scale, top
        )


def quantizer_of(activation: ActivationSpec) -> tuple[int, int, float, int, float]:
    """(rules, ranges, stored scale, stored zero point, top code) of the native quantizer."""
    ranges = RANGES[activation.granularity] if activation.dynamic else STATIC
    return rules_of(activation), ranges, 1.0 if activation.scale is None else activation.scale, activation.zero, activation.top_code


def rules_of(activation: ActivationSpec) -> int:
    """How the native quantizer turns values into codes; native/src/interface.cpp."""
    return (SYMMETRIC if activation.symmetric else 0) | (RECIPROCAL if activation.reciprocal else 0)
