"""Qwen3, the mixtures of experts."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.routing_config import ExpertTraits
from bitgrain.models.sparse import SparseLM


class Qwen3MoeForCausalLM(SparseLM):
    """As Qwen3, with experts in place of the MLP in the layers that the configuration names."""

    traits = Traits(window="switched", experts=ExpertTraits(dense="listed"))
    qk_norm = True
