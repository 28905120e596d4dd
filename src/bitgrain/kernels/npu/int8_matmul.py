"""W8A8: integer weights of up to 8 bits times integer activations, by npu_quant_matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.npu.antiquant_layout import parts_of
from bitgrain.kernels.npu.integer_input import HALF, Quantized, integer_problem, quantize, row_scales, signed_codes, stored_values
from bitgrain.kernels.npu.operators import NpuKernel, missing, operators
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight

OPERATORS = ("npu_quant_matmul", "npu_quantize", "npu_dynamic_quant", "npu_format_cast")
FRACTAL_NZ = 29


class NpuInt8Linear(NpuKernel):
    """y = (x_codes w_codes - x_zero * sum(w_codes)) * x_scale * w_scale + bias, products and sums exact in int32.

    One call computes it for 16-bit x: the scale of x goes in per token (a float32 scale alone would be cut to 19 bits), a static
    zero point as an int32 bias, or within the float32 bias where there is one.  float32 x, and zero points that differ from token to
    token, take the int32 sums and scale them in float32.  Weights of fewer than 8 bits are held as int8.
    """

    name = "npu.int8_matmul"
    needs = OPERATORS

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.NATIVE

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        why = integer_problem(self.platform, problem) or missing(self.platform, *OPERATORS)
        return Refusal(why) if why else None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, IntAffineWeight)  # refusal() asked for the kind
        codes, ops = signed_codes(weight), operators(self.platform)
        layouts = []
        tensors = {"scale": row_scales(weight), **stored_values(activation, codes.device)}
        for place, part in enumerate(parts_of(weight.shape[0])):
            piece = codes[:, part].contiguous()
            why = plain_layout(piece)
            tensors[f"weight{place or ''}"] = piece if why else ops.npu_format_cast(piece, FRACTAL_NZ)
            layouts.append(f"ND: {why}" if why else "NZ")
        if not activation.symmetric:
            tensors["sums"] = codes.sum(0, dtype=torch.int32)
        return Prepared(weight.shape, tensors, activation, {"layout": layouts})

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        n, tensors = prepared.shape[0], prepared.tensors
        if x.shape[0] == 0:
            return x.new_empty(0, n)
        quantized = quantize(operators(self.platform), prepared.activation, x, tensors)
        run = self._fused if x.dtype in HALF and (quantized.zero is None or not prepared.activation.dynamic) else self._sums
        pieces = []
        for place, part in enumerate(parts_of(n)):
            sums = None if quantized.zero is None else tensors["sums"][part]
            pieces.append(run(quantized, tensors[f"weight{place or ''}"], tensors["scale"][part], sums, None if bias is None else bias[part], x.dtype))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def _fused(self, x: Quantized, weight: Tensor, scale: Tensor, sums: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        added = None if bias is None else bias.float()
        if sums is not None and x.zero is not None:
            moved = -x.zero[0] * sums  # x_zero is one number here
            added = moved if added is None else added + moved.float() * x.scale * scale
        per_token = x.scale.expand(x.codes.shape[0]).contiguous()
        y: Tensor = operators(self.platform).npu_quant_matmul(x.codes, weight, scale, pertoken_scale=per_token, bias=added, output_dtype=dtype)
        return y

    def _sums(self, x: Quantized, weight: Tensor, scale: Tensor, sums: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        total = operators(self.platform).npu_quant_matmul(x.codes, weight, scale, output_dtype=torch.int32)
        return scaled_sums(total, x, scale, sums, bias, dtype)


def scaled_sums(total: Tensor, x: Quantized, scale: Tensor, sums: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(total - x_zero * sums) * x_scale * scale + bias in float32, rounded once to `dtype`.

    Args:
        total: int32 [M, N].
        scale, sums, bias: [N] or [M, N].
    """
    if sums is not None and x.zero is not None:
        total = total - x.zero * sums
    y = total.float() * scale * x.scale[:, None]
    return (y if bias is None else y + bias.float()).to(dtype)


def plain_layout(weight: Tensor) -> str:
    """Why a matrix [K, N] stays in its plain layout; empty when it can be tiled."""
    if weight.shape[0] % 16 or weight.shape[1] % 32:
        return f"[{weight.shape[0]}, {weight.shape[1]}] is not made of whole tiles of 16 by 32"
    return ""
