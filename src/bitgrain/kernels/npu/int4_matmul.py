"""W4A4: 4-bit integers on both sides, eight per word, by npu_quant_matmul."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.npu.integer_input import DYNAMIC_INT4, LARGEST_SIDE, integer_problem, row_scales, signed_codes
from bitgrain.kernels.npu.operators import NpuKernel, features, missing, operators
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight

OPERATORS = ("npu_quant_matmul", "npu_dynamic_quant", "npu_convert_weight_to_int4pack")
WORD = 8


class NpuInt4Linear(NpuKernel):
    """y = x_codes w_codes * x_scale * w_scale + bias; x quantized per token to -7 to 7 by npu_dynamic_quant.

    The operator takes no bias beside a scale per token, and a bias that is added to the rounded product would round it twice: with one,
    both sides are unpacked for the call and multiplied as int8.
    """

    name = "npu.int4_matmul"
    rank = 65
    needs = OPERATORS

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.NATIVE

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        why = integer_problem(self.platform, problem) or self._own_refusal(problem) or missing(self.platform, *OPERATORS)
        return Refusal(why) if why else None

    def _own_refusal(self, problem: LinearProblem) -> str:
        if problem.activation != DYNAMIC_INT4 or problem.weight.bits > 4:
            return "takes weights of up to 4 bits and dynamic int4 activations per token, symmetric, with the largest at 7"
        if problem.dtype not in ("float16", "bfloat16"):
            return f"takes float16 and bfloat16 inputs, not {problem.dtype}"
        if "int4_dot" not in features(self.platform):
            return "the device does not multiply int4"
        if problem.k % WORD:
            return f"takes K in multiples of {WORD}, not {problem.k}"
        return f"takes N up to {LARGEST_SIDE}" if problem.n > LARGEST_SIDE - WORD else ""

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, IntAffineWeight)  # refusal() asked for the kind
        spare = -weight.shape[0] % WORD
        codes = pad(signed_codes(weight, -8, 7), (0, spare))
        words = operators(self.platform).npu_convert_weight_to_int4pack(codes.to(torch.int32))
        return Prepared(weight.shape, {"weight": words, "scale": pad(row_scales(weight), (0, spare), value=1.0)}, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        n, ops = prepared.shape[0], operators(self.platform)
        if x.shape[0] == 0:
            return x.new_empty(0, n)
        words, per_token = ops.npu_dynamic_quant(x, dst_type=torch.quint4x2)
        weight, scale = prepared.tensors["weight"], prepared.tensors["scale"]
        added = None
        if bias is not None:
            words, weight, added = unpacked(words), unpacked(weight), pad(bias.float(), (0, scale.shape[0] - n))
        y: Tensor = ops.npu_quant_matmul(words, weight, scale, pertoken_scale=per_token, bias=added, output_dtype=x.dtype)
        return y[:, :n].contiguous()


def unpacked(words: Tensor) -> Tensor:
    """int8 [R, 8 * C] of int32 words [R, C] of 4-bit integers, the first in the lowest bits."""
    # the upper four bits of a word, moved down with their sign
    lanes = torch.stack([(words << (28 - 4 * place)) >> 28 for place in range(WORD)], -1)
    return lanes.flatten(1).to(torch.int8)
