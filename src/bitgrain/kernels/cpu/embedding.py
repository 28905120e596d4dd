"""Rows of unquantized tables."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import EmbeddingProblem, Fidelity, Prepared, Refusal
from bitgrain.weights import ActivationSpec, DenseWeight, Weight


class DenseEmbedding:
    """rows[i] = W[index[i]], rounded once to the asked dtype: a gather of stored rows, nothing is computed."""

    name = "cpu.embedding"
    rank = 40

    def fidelity(self, problem: EmbeddingProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: EmbeddingProblem) -> Refusal | None:
        if problem.weight.kind != "dense":
            return Refusal(f"gathers rows of dense tables, not of {problem.weight.kind} ones")
        return None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, DenseWeight)  # refusal() asked for the kind
        return Prepared(weight.shape, {"data": weight.data}, activation)

    def apply(self, index: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        return torch.nn.functional.embedding(index, prepared.tensors["data"]).to(dtype)
