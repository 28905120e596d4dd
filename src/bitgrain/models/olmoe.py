"""OLMoE."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.routing_config import ExpertTraits
from bitgrain.models.sparse import SparseLM


class OlmoeForCausalLM(SparseLM):
    """As Llama, with one norm over all heads of q, one over all of k, and experts in every layer.

    Source: transformers 5.19 modeling_olmoe.
    """

    traits = Traits(experts=ExpertTraits(size="intermediate_size"), defaults={"rms_norm_eps": 1e-5})
    qk_norm_all = True
