"""DeepSeek-V2."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.latent import LatentLM
from bitgrain.models.routing_config import ExpertTraits


class DeepseekV2ForCausalLM(LatentLM):
    """Latent attention; experts of the best groups, and some that all tokens go through.

    Source: transformers 5.19 modeling_deepseek_v2; `moe_layer_freq` as in the model's own code.
    """

    traits = Traits(
        experts=ExpertTraits("limited", dense="leading", shared="shared_experts"),
        latent=True,
        defaults={"n_shared_experts": 2},
    )
    wide_rope = True
