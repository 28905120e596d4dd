"""DeepSeek-V3 and R1."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.latent import LatentLM
from bitgrain.models.routing_config import ExpertTraits


class DeepseekV3ForCausalLM(LatentLM):
    """As DeepSeek-V2, with experts that are scored one by one and chosen by corrected scores.

    Source: transformers 5.19 modeling_deepseek_v3; `moe_layer_freq` as in the model's own code.
    """

    traits = Traits(
        experts=ExpertTraits("corrected", dense="leading", shared="shared_experts"),
        latent=True,
        further_layers=True,
        defaults={
            "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
        },
    )  # fmt: skip
