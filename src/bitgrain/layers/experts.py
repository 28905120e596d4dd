"""Mixtures of experts: each token goes through the few experts that its router prefers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitgrain.layers.activation import Gate
from bitgrain.layers.mlp import GatedMLP

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens find their experts.

    Args:
        count:       how many experts there are.
        per_token:   how many a token gets.
        normalize:   their weights are made to sum to 1.
        over_chosen: the softmax is taken over the scores of the chosen experts only, so that they sum to 1 anyway.
        router:      name of the module that scores the experts.
    """

    count: int
    per_token: int
    normalize: bool
    over_chosen: bool = False
    router: str = "gate"


class SparseMLP(nn.Module):
    """y = sum over the chosen experts e of p[e] * expert_e(x), with p = softmax(router(x)) in float32, for x [M, K].

    Experts add up in the order of their index, so that a row's result does not depend on the other rows.
    """

    def __init__(self, builder: ModelBuilder, name: str, join: str | Gate, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.router = builder.linear(f"{name}.{routing.router}")
        self.experts = nn.ModuleList(GatedMLP(builder, f"{name}.experts.{i}", join) for i in range(routing.count))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.route(x)
        out = torch.zeros_like(x)
        for index in sorted(set(chosen.flatten().tolist())):
            row, place = (chosen == index).nonzero(as_tuple=True)
            part = self.experts[index](x[row]) * weight[row, place, None]
            out.index_add_(0, row, part)  # an expert's rows are distinct: no two sums meet in one call
        return out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(weights of x's dtype, int64 expert indices), each [M, per_token]."""
        scores = self.router(x)
        if self.routing.over_chosen:
            best, chosen = torch.topk(scores, self.routing.per_token, dim=-1)
            return torch.softmax(best, dim=-1, dtype=torch.float32).to(scores.dtype), chosen
        probability = torch.softmax(scores, dim=-1, dtype=torch.float32)
        weight, chosen = torch.topk(probability, self.routing.per_token, dim=-1)
        if self.routing.normalize:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return weight.to(scores.dtype), chosen
