"""Rows of tables of every kind, gathered and decoded in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import EmbeddingProblem, Fidelity, Prepared, Refusal
from bitgrain.kernels.triton.availability import TritonKernel
from bitgrain.kernels.triton.codebooks import CODEBOOK_KERNELS
from bitgrain.kernels.triton.coded import LAYOUTS, CodedLinear, coded_layout
from bitgrain.kernels.triton.decoded import DecodedLinear, Layout, decoding_of, unable
from bitgrain.kernels.triton.super_blocks import SuperBlockLinear
from bitgrain.weights import ActivationSpec, DenseWeight, Weight

_LINEARS = (*CODEBOOK_KERNELS, SuperBlockLinear)


class DecodedEmbedding(TritonKernel):
    """rows[i] = W[index[i]], decoded in float32 and rounded once to the asked dtype; equal to the definition to the bit.

    Tables of integers, floats and unquantized numbers stay the tensors that they are.  The others are kept as the linear kernel
    keeps them, so that a table that an output head shares through one of `heads` is held once.
    """

    name = "triton.rows"
    heads = (*(kernel.name for kernel in _LINEARS), CodedLinear.name)

    def __init__(self, platform: str) -> None:
        super().__init__(platform)
        self._linears: dict[str, DecodedLinear] = {kernel.kind: kernel(platform) for kernel in _LINEARS}

    def fidelity(self, problem: EmbeddingProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: EmbeddingProblem) -> Refusal | None:
        kind = problem.weight.kind
        if kind in self._linears:
            why = self._linears[kind].limit(problem.weight)
        else:
            why = "" if kind in LAYOUTS or kind == "dense" else f"has no decoder for {kind} weights"
        why = why or unable(self, problem.dtype)
        return Refusal(why) if why else None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        return self._layout(weight).prepared(weight, activation)

    def _layout(self, weight: Weight) -> Layout:
        if isinstance(weight, DenseWeight):
            return Layout("row_decoders.decode_dense", [weight.data], (0,), (0,))
        kind = weight.spec.kind
        return self._linears[kind].layout(weight) if kind in self._linears else coded_layout(weight)

    def apply(self, index: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        from bitgrain.kernels.triton.weight_product import rows_of

        return rows_of(decoding_of(prepared), index, prepared.shape[1], dtype)
