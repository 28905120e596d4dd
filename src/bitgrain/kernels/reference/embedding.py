"""Embedding by definition: gather rows, dequantize only those."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import EmbeddingProblem, Fidelity, Prepared, Refusal
from bitgrain.weights import ActivationSpec, Weight


class ReferenceEmbedding:
    """rows[i] = dequantize(W)[index[i]], rounded once to the asked dtype.  Takes everything."""

    name = "reference.embedding"
    rank = 0

    def fidelity(self, problem: EmbeddingProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: EmbeddingProblem) -> Refusal | None:
        return None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        return Prepared(weight.shape, weight.data_tensors(), activation, {"weight": weight})

    def apply(self, index: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        weight: Weight = prepared.meta["weight"]
        return weight.gather_rows(index).to(dtype)
