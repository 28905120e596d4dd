"""Rows of unquantized tables, and of packed ones that the output head multiplies with."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import EmbeddingProblem, Fidelity, Prepared, Refusal
from bitgrain.kernels.cpu.super_block import SuperBlockInt8Linear, SuperBlockLinear
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


class SharedPanels:
    """rows[i] = W[index[i]] out of the panels that the output head multiplies with, so that a tied table is held once.

    A table that no head shares stays as it is stored: packing it would only cost time.
    """

    name = "cpu.shared_panels"
    rank = 30
    linear = SuperBlockLinear()
    heads = (SuperBlockLinear.name, SuperBlockInt8Linear.name)

    def fidelity(self, problem: EmbeddingProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: EmbeddingProblem) -> Refusal | None:
        if problem.head in self.heads:
            return None
        return Refusal(f"gathers rows of tables that an output head shares through {' or '.join(self.heads)}")

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        return self.linear.prepare(weight, activation)

    def apply(self, index: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        return self.linear.rows(prepared, index).to(dtype)
