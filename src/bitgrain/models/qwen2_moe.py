"""Qwen1.5 and Qwen2, the mixtures of experts."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.routing_config import ExpertTraits
from bitgrain.models.sparse import SparseLM


class Qwen2MoeForCausalLM(SparseLM):
    """As Qwen2, with experts in place of the MLP, and beside them one that all tokens go through, as far as its own gate says.

    Source: transformers 5.19 modeling_qwen2_moe.
    """

    traits = Traits(window="even", qkv_bias=True, experts=ExpertTraits(dense="listed", shared="shared_expert"), implements=frozenset({"qkv_bias"}))
