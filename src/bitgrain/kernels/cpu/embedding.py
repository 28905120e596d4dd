"""Rows of unquantized tables, and of packed ones that the output head multiplies with."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import EmbeddingProblem, Fidelity, Prepared, Refusal
from bitgrain.kernels.cpu.block_float import BlockFloatLinear
from bitgrain.kernels.cpu.float8 import Float8Linear
from bitgrain.kernels.cpu.int_affine import IntAffineLinear
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


class SharedRows:
    """rows[i] = W[index[i]] out of the panels that the output head multiplies with, so that a tied table is held once.

    A table that no head shares stays as it is stored: packing it would only cost time.

    Args:
        linear: whose panels they are; `rows(prepared, index)` takes rows out of them, `rows_refusal(spec)` says why it cannot.
        heads:  names of the linear kernels that multiply with these panels.
    """

    rank = 30

    def __init__(self, linear: SuperBlockLinear | IntAffineLinear | Float8Linear | BlockFloatLinear, heads: tuple[str, ...] = ()) -> None:
        self.linear, self.heads = linear, heads or (linear.name,)
        self.name = f"{linear.name}_rows"

    def fidelity(self, problem: EmbeddingProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: EmbeddingProblem) -> Refusal | None:
        if problem.head not in self.heads:
            return Refusal(f"gathers rows of tables that an output head shares through {' or '.join(self.heads)}")
        why = self.linear.rows_refusal(problem.weight)
        return Refusal(why) if why else None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        return self.linear.prepare(weight, activation)

    def apply(self, index: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        return self.linear.rows(prepared, index).to(dtype)


SHARED_ROWS = (
    SharedRows(SuperBlockLinear(), (SuperBlockLinear.name, SuperBlockInt8Linear.name)),
    SharedRows(IntAffineLinear()),
    SharedRows(Float8Linear()),
    SharedRows(BlockFloatLinear()),
)
