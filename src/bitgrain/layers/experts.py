"""The experts of one layer: each token goes through the few that its router chose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitgrain.layers.activation import Gate
from bitgrain.layers.mlp import GatedMLP

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder


class Experts(nn.Module):
    """y[m] = sum over places p of weight[m, p] * expert_{chosen[m, p]}(x[m]).

    Experts add up in the order of their index, so that a row's result does not depend on the other rows.
    """

    def __init__(self, builder: ModelBuilder, name: str, count: int, join: str | Gate) -> None:
        super().__init__()
        self.experts = nn.ModuleList(GatedMLP(builder, f"{name}.{i}", join) for i in range(count))

    def forward(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """[M, K] for x [M, K], and weight of x's dtype and int64 expert indices, each [M, per_token]."""
        out = torch.zeros_like(x)
        for index in sorted(set(chosen.flatten().tolist())):
            row, place = (chosen == index).nonzero(as_tuple=True)
            part = self.experts[index](x[row]) * weight[row, place, None]
            out.index_add_(0, row, part)  # an expert's rows are distinct: no two sums meet in one call
        return out
