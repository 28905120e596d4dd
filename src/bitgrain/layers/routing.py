"""Routing: which experts a token gets, and with which weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder

# Added to a sum of weights before they are divided by it: changes no sum that float32 tells from zero.
SMALLEST_SUM = 1e-20


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens find their experts; s are an expert's scores W x, p what they become.

    Args:
        count:        how many experts there are.
        per_token:    how many a token gets: those of the largest p.
        normalize:    their weights are made to sum to 1.
        over_chosen:  p = s, and the weights are the softmax over the chosen experts only, so that they sum to 1 anyway.
        router:       name of the module that scores the experts.
        sigmoid:      p = sigmoid(s), each by itself; else p = softmax(s) over all experts.
        groups:       experts lie in so many groups of equal size, one after another; 1: there are none.
        kept_groups:  groups that a token may choose from.
        group_score:  what a group is worth, and what becomes of those that are not kept:
                      "best": its largest p; p of other groups' experts becomes 0, for their weights too;
                      "two best": the sum of its two largest; other groups' experts come last, and keep p as their weight.
        corrected:    a stored value per expert is added to p for choosing; weights are without it.
        scale:        multiplies the weights.
        wide:         the router's product is float32, whatever the dtype of activations.
        wide_weights: weights are float32; else of the scores' dtype.
    """

    count: int
    per_token: int
    normalize: bool
    over_chosen: bool = False
    router: str = "gate"
    sigmoid: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_score: str = "best"
    corrected: bool = False
    scale: float = 1.0
    wide: bool = False
    wide_weights: bool = False


class Router(nn.Module):
    """Scores the experts of one layer, and chooses the best."""

    def __init__(self, builder: ModelBuilder, name: str, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        module = f"{name}.{routing.router}"
        self.linear = builder.linear(module, wide=True) if routing.wide else builder.linear(module)
        self.correction = builder.vector(correction_of(module), routing.count, wide=True) if routing.corrected else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(weights of x's dtype or float32, int64 expert indices), each [M, per_token], for x [M, K]."""
        return choose(self.linear(x.float() if self.routing.wide else x), self.routing, self.correction)


def correction_of(router: str) -> str:
    """Name of the vector [experts] that a corrected router adds for choosing."""
    return f"{router}.e_score_correction_bias"


def choose(scores: Tensor, routing: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(weights, int64 expert indices), each [M, per_token], for scores [M, experts].

    Args:
        correction: float32 [experts], where the routing is corrected.
    """
    if routing.over_chosen:
        best, chosen = torch.topk(scores, routing.per_token, dim=-1)
        return torch.softmax(best, dim=-1, dtype=torch.float32).to(scores.dtype), chosen
    worth = scores.float().sigmoid() if routing.sigmoid else torch.softmax(scores, dim=-1, dtype=torch.float32)
    ranked = worth if correction is None else worth + correction
    if routing.groups > 1:
        best_only = routing.group_score == "best"
        ranked = ranked.masked_fill(~_kept(ranked, routing), 0.0 if best_only else -torch.inf)
        worth = ranked if best_only else worth
    chosen = torch.topk(ranked, routing.per_token, dim=-1).indices
    weight = worth.gather(-1, chosen)
    if routing.normalize:
        weight = weight / (weight.sum(dim=-1, keepdim=True) + SMALLEST_SUM)
    if routing.scale != 1:
        weight = weight * routing.scale
    return weight if routing.wide_weights else weight.to(scores.dtype), chosen


def _kept(ranked: Tensor, routing: Routing) -> Tensor:
    """bool [M, experts]: experts of the groups that a token may choose from."""
    grouped = ranked.unflatten(-1, (routing.groups, -1))
    worth = grouped.amax(dim=-1) if routing.group_score == "best" else grouped.topk(2, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, worth.topk(routing.kept_groups, dim=-1).indices, True)
    return kept.repeat_interleave(ranked.shape[-1] // routing.groups, dim=-1)
