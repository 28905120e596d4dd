"""Routing: which experts a token gets, and with which weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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


class Router(nn.Module):
    """Scores the experts of one layer by softmax(W x) in float32, and chooses the best."""

    def __init__(self, builder: ModelBuilder, name: str, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.linear = builder.linear(f"{name}.{routing.router}")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(weights of x's dtype, int64 expert indices), each [M, per_token], for x [M, K]."""
        return choose(self.linear(x), self.routing)


def choose(scores: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """(weights of the scores' dtype, int64 expert indices), each [M, per_token], for scores [M, experts]."""
    if routing.over_chosen:
        best, chosen = torch.topk(scores, routing.per_token, dim=-1)
        return torch.softmax(best, dim=-1, dtype=torch.float32).to(scores.dtype), chosen
    probability = torch.softmax(scores, dim=-1, dtype=torch.float32)
    weight, chosen = torch.topk(probability, routing.per_token, dim=-1)
    if routing.normalize:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    return weight.to(scores.dtype), chosen
