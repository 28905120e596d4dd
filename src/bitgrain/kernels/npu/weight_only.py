"""W4A16 and W8A16: integer weights that are decoded inside the product, 16-bit activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.npu.antiquant_layout import OPERATORS, Scales, columns, lay_out, layout_problem, parts_of, scales_of
from bitgrain.kernels.npu.operators import NpuKernel, operators
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight


class NpuWeightOnly(NpuKernel):
    """y = x ((codes + offset) * scale)^T + bias by npu_weight_quant_batchmatmul; up to 4 bits as 4-bit words, more as int8.

    The operator adds the offset: it is the middle of the codes less the zero point.  It multiplies in x's dtype: scales of another
    type, and then decoded weights, are rounded to it, which changes the numbers: approximate.  No operator gives wider sums, so that
    there is no exact way.  Act-order becomes a gather of x's columns.
    """

    name = "npu.weight_only"
    needs = OPERATORS

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.APPROXIMATE

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        why = layout_problem(self.platform, problem, grouped=False)
        return Refusal(why) if why else None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, IntAffineWeight)  # refusal() asked for the kind
        return lay_out(weight, operators(self.platform))

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        n = prepared.shape[0]
        if x.shape[0] == 0:
            return x.new_empty(0, n)
        x, scales = columns(x, prepared), scales_of(prepared, x.dtype)
        width = scales.scale.shape[1]
        wide = None if bias is None else pad(bias_for(x.dtype, bias), (0, width - n))
        pieces = [self._piece(x, prepared.tensors[f"weight{place or ''}"], part, scales, wide, prepared.meta["group"]) for place, part in enumerate(parts_of(width))]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return y[:, :n].contiguous()

    def _piece(self, x: Tensor, weight: Tensor, part: slice, scales: Scales, bias: Tensor | None, group: int) -> Tensor:
        """[M, columns of `part`] of x's dtype."""
        offset = None if scales.offset is None else scales.offset[:, part].contiguous()
        own = None if bias is None else bias[part].contiguous()
        y: Tensor = operators(self.platform).npu_weight_quant_batchmatmul(
            x, weight, scales.scale[:, part].contiguous(), offset, bias=None if scales.factor is not None else own, antiquant_group_size=group
        )
        return y if scales.factor is None else rescaled(y, scales.factor[part], own)


def bias_for(dtype: torch.dtype, bias: Tensor) -> Tensor:
    """A bias as products with 16-bit inputs take it: float32 beside bfloat16 inputs, which refuse a bfloat16 one."""
    return bias.to(torch.float16 if dtype == torch.float16 else torch.float32)


def rescaled(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """y * factor + bias in float32, rounded to y's dtype."""
    total = y.float() * factor
    return (total if bias is None else total + bias.float()).to(y.dtype)
